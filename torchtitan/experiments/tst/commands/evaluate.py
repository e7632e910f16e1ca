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
import signal
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ..errors import ArgumentError
from ..resilience.stop import STOP_SIGNALS, STOPPED_EXIT_CODE
from .arguments import Model, check_positive, log_progress


def main(
    overrides: list[str],
    model: Model,
    /,
    all: bool = False,
    watch: bool = False,
    patience: Annotated[int, arg(metavar="HOURS")] = 12,
    tasks: str | None = None,
    include_path: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    task_data: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    output: Annotated[Path | None, arg(metavar="JSON")] = None,
    batch_size: str = "auto",
    limit: Annotated[int | None, arg(metavar="N")] = None,
    device: str | None = None,
) -> None:
    """Evaluate a model.

    Args:
        overrides: Arguments of the job.
        model: The model to evaluate.
        all: Score every checkpoint of a run folder, except on tasks that it is scored on already.
        watch: Like --all, and wait for new checkpoints until the run ends.
        patience: With --watch, stop waiting when the run has written nothing for so long.
        tasks: Tasks of the harness, separated by commas. By default those of Table 3.
        include_path: Folder with more tasks, in the YAML of the harness.
        task_data: Folder with the data of the tasks, for a machine without a network.
        output: File for the results.
            By default evaluation.json in an exported folder, and
            evaluation-step-N.json in a checkpoint's run folder.
        batch_size: Sequences in a batch.
        limit: Number of documents of each task, for a quick test.
        device: Device of the model. By default the accelerator, or cpu.
    """
    from ..results.evaluation import evaluate, table
    from ..results.harness import Harness
    from ..results.run_evaluation import evaluate_run
    from ..results.run_evaluation import table as table_of_run
    from ..results.scores import EVALUATIONS_FILE, METRICS

    check_positive(limit=limit, patience=patience)
    log_progress()
    for number in STOP_SIGNALS:  # so that temporary files are removed
        signal.signal(number, lambda *_: sys.exit(STOPPED_EXIT_CODE))
    chosen = tasks.split(",") if tasks else list(METRICS)
    harness = Harness(chosen, include_path, batch_size, limit, device, task_data)
    if all or watch:
        if output:
            raise ArgumentError(f"--output {output}: --all and --watch write {EVALUATIONS_FILE}")
        say = functools.partial(print, flush=True)
        evaluate_run(model, overrides, harness, say, watch=patience if watch else None)
        written, lines = model / EVALUATIONS_FILE, table_of_run(model, chosen)
    else:
        rows, written = evaluate(model, overrides, output, harness)
        lines = table(rows)
    print("\n".join(lines))
    if limit:
        print(f"These scores are of the first {limit} documents of each task only")
    print(f"results: {written}")
