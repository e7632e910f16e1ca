"""Score a model on the paper's benchmarks, 0-shot, next to the paper's scores (Table 3).

    tst evaluate outputs/270M/tst
    tst evaluate EXPORTED_FOLDER --tasks arc_easy,piqa --limit 100

The LM-Eval harness does the work, and fetches its data from the Hugging Face hub the first time.
Further arguments are the job's, as for tst export.
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
    """Score a model.

    Args:
        overrides: the job's arguments.
        model: what to score.
        tasks: Of the harness, separated by commas. By default those of Table 3.
        include_path: Further tasks, in the harness's YAML.
        output: By default evaluation.json in an exported folder, and evaluation-step-N.json in the
            run folder of a checkpoint.
        batch_size: Sequences at a time.
        limit: Documents of each task, for a quick try.
        device: By default the accelerator, or cpu.
    """
    from ..results.evaluation import METRICS, Harness, evaluate, table

    check_positive(limit=limit)
    log_progress()
    chosen = tasks.split(",") if tasks else list(METRICS)
    harness = Harness(chosen, include_path, batch_size, limit, device)
    rows, written = evaluate(model, overrides, output, harness)
    print("\n".join(table(rows)))
    if limit:
        print(f"Of the first {limit} documents of each task only")
    print(f"results: {written}")
