"""Evaluate a model on the paper's benchmarks, 0-shot, next to the paper's scores.

    tst evaluate outputs/270M/tst
    tst evaluate EXPORTED_FOLDER --tasks arc_easy,piqa --limit 100

This runs the LM-Eval harness, which downloads its data from the Hugging Face hub the first time.
The paper's scores are those of its Table 3. Further arguments override the job, as for tst export.
"""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from .arguments import Model, check_positive, log_progress


def main(
    overrides: list[str],
    model: Model,
    /,
    tasks: str | None = None,
    include_path: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    output: Annotated[Path | None, arg(metavar="JSON")] = None,
    batch_size: str = "auto",
    limit: Annotated[int | None, arg(metavar="N")] = None,
    device: str | None = None,
) -> None:
    """Evaluate a model.

    Args:
        overrides: Arguments of the job.
        model: The model to evaluate.
        tasks: Tasks of the harness, separated by commas. By default those of Table 3.
        include_path: Folder with more tasks, in the YAML of the harness.
        output: File for the results.
            By default evaluation.json in an exported folder, and
            evaluation-step-N.json in a checkpoint's run folder.
        batch_size: Sequences in a batch.
        limit: Number of documents of each task, for a quick test.
        device: Device of the model. By default the accelerator, or cpu.
    """
    from ..results.evaluation import evaluate, table
    from ..results.harness import Harness
    from ..results.scores import METRICS

    check_positive(limit=limit)
    log_progress()
    chosen = tasks.split(",") if tasks else list(METRICS)
    harness = Harness(chosen, include_path, batch_size, limit, device)
    rows, written = evaluate(model, overrides, output, harness)
    print("\n".join(table(rows)))
    if limit:
        print(f"These scores are of the first {limit} documents of each task only")
    print(f"results: {written}")
