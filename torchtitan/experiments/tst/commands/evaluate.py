"""Evaluate a model on the paper's benchmarks, 0-shot, next to the paper's scores.

    tst evaluate outputs/270M/tst
    tst evaluate EXPORTED_FOLDER --tasks arc_easy,piqa --limit 100
    tst evaluate outputs/270M/tst --watch

This runs the LM-Eval harness, which downloads its data from the Hugging Face hub the first time.
The paper's scores are those of its Table 3. With --all or --watch, each checkpoint of a run is
scored once, and the scores go to evaluations.jsonl in the run folder, and to the run's TensorBoard
and W&B. Further arguments override the job, as for tst export.
"""

import functools
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ..errors import ArgumentError
from ..results.scores import EVALUATIONS_FILE, METRICS
from .arguments import Model, check_positive
from .harness_options import HarnessOptions

PATIENCE = 6  # hours


def main(
    overrides: list[str],
    model: Model,
    /,
    harness: HarnessOptions,
    all: bool = False,
    watch: bool = False,
    patience: Annotated[int | None, arg(metavar="HOURS")] = None,
    output: Annotated[Path | None, arg(metavar="JSON")] = None,
) -> None:
    """Evaluate a model.

    Args:
        overrides: Arguments of the job.
        model: The model to evaluate.
        harness: Options of the harness.
        all: Score every checkpoint of a run folder, except on tasks that it is scored on already.
        watch: Like --all, and wait for new checkpoints until the run ends.
        patience: With --watch, stop waiting when the run has written nothing for so long.
            By default 6 hours.
        output: File for the results.
            By default evaluation.json in an exported folder, and
            evaluation-step-N.json in a checkpoint's run folder.
    """
    check_positive(patience=patience)
    if patience and not watch:
        raise ArgumentError(f"--patience {patience}: works only with --watch. Add --watch")
    if output and (all or watch):
        raise ArgumentError(
            f"--output {output}: --all and --watch write {EVALUATIONS_FILE} in the run folder. "
            "Remove --output"
        )
    tasks = harness.chosen(METRICS)
    built = harness.build(tasks)
    if all or watch:
        from ..results.run_evaluation import evaluate_run, table_of_run

        say = functools.partial(print, flush=True)
        hours = (patience or PATIENCE) if watch else None
        evaluate_run(model, overrides, built, say, patience=hours)
        written, lines = model / EVALUATIONS_FILE, table_of_run(model, tasks, harness.limit)
    else:
        from ..results.evaluation import evaluate, table

        rows, written = evaluate(model, overrides, output, built)
        lines = table(rows)
    print("\n".join(lines))
    if harness.limit:
        print(f"These scores are of the first {harness.limit} documents of each task only")
    print(f"results: {written}")
