"""Score a model 0-shot on the paper's benchmarks (Table 3) with the LM-Eval harness."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from .. import paper
from ..errors import ArgumentError
from ..resilience.checkpoint.inventory import find_checkpoint
from .export import check_exportable, exported, is_exported
from .harness import Harness, scores_of
from .scores import METRICS, Score
from .tables import aligned


def evaluate(
    model: Path, job_arguments: list[str], output: Path | None, harness: Harness
) -> tuple[dict[str, dict[str, Score]], Path]:
    """Score a model, and write the scores as JSON.

    Args:
        model: a checkpoint, a run folder or an exported folder.
        job_arguments: arguments of a checkpoint's job, which override the run's config.
        output: the file to write; None for evaluation.json in an exported folder, and for
            evaluation-step-N.json in the run folder of a checkpoint.
        harness: the harness with its settings.

    Returns:
        The score of each task, of the model and of the paper's runs at its size, and the file.

    Raises:
        ArgumentError: for tasks that the harness does not know, or that this model cannot do, and
            for an output that already exists.
        CheckpointError: for a checkpoint that cannot be read.
        ExportError: for a checkpoint that cannot be exported.
    """
    source = model if is_exported(model) else find_checkpoint(model)
    output = output or _default_output(source)
    if output.exists():
        raise ArgumentError(f"{output} already exists. Give another file with --output")
    check_exportable(source, job_arguments)  # tasks may be downloaded, which takes long
    harness.check()
    output.parent.mkdir(parents=True, exist_ok=True)
    with exported(source, job_arguments) as folder:
        results = harness.run(harness.load(folder), harness.tasks)
    parameters = results["config"]["model_num_parameters"]
    scores = {task: found.score for task, found in scores_of(results, harness.tasks).items()}
    of_paper = _scores_of_paper(parameters)
    content = {
        "model": os.fspath(model),
        "parameters": parameters,
        "limit": harness.limit,
        "scores (%)": {task: score.value for task, score in scores.items()},
        "standard errors (%)": {task: score.error for task, score in scores.items()},
        "paper (%)": of_paper,
        "harness": results,
    }
    output.write_text(json.dumps(content, indent=2, default=str) + "\n")
    rows = {os.fspath(model): scores}
    for name, of_run in of_paper.items():
        rows[f"paper: {name}"] = {task: Score(value) for task, value in of_run.items()}
    return rows, output


def _scores_of_paper(parameters: int) -> dict[str, dict[str, float]]:
    """Return the rows of Table 3 for the model nearest in parameters: percent for each task."""
    nearest = paper.nearest_model(parameters)
    return {
        run.name: run.scores for run in paper.runs().values() if run.model == nearest and run.scores
    }


def table(rows: Mapping[str, Mapping[str, Score]]) -> list[str]:
    """Return rows of Table 3 as lines, and below them the first row's scores of other tasks."""
    columns = list(METRICS)
    cells = [
        [name, *(str(scores[c]) if c in scores else "-" for c in columns)]
        for name, scores in rows.items()
    ]
    lines = aligned([["", *columns], *cells])
    own = next(iter(rows.values()))
    return lines + [f"{task}: {score}" for task, score in own.items() if task not in METRICS]


def _default_output(model: Path) -> Path:
    if is_exported(model):
        return model / "evaluation.json"
    return model.parent.parent / f"evaluation-{model.name}.json"
