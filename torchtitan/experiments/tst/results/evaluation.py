"""Score a model 0-shot on the paper's benchmarks (Table 3) with the LM-Eval harness."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from typing_extensions import override

from .. import paper
from ..data.tokenizer import open_tokenizer
from ..errors import ArgumentError
from ..resilience.checkpoint.inventory import find_checkpoint
from .export import exported
from .tables import aligned

# The columns of Table 3, and the metric of each. The paper does not say which metrics it uses.
# These are the harness's length-normalised accuracies where it has them.
METRICS = {
    "hellaswag": "acc_norm",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "mmlu": "acc",
    "boolq": "acc",
    "openbookqa": "acc_norm",
    "piqa": "acc_norm",
    "winogrande": "acc",
}


@dataclass(frozen=True)
class Harness:
    """Settings of the harness.

    Attributes:
        tasks: names of tasks that the harness knows.
        include_path: a folder with YAML files of further tasks.
        batch_size: number of sequences, or "auto".
        limit: number of documents of each task; None for all.
        device: torch's name of the device; None for the accelerator, or the CPU without one.
    """

    tasks: list[str]
    include_path: Path | None = None
    batch_size: str = "auto"
    limit: int | None = None
    device: str | None = None


def evaluate(
    model: Path, job_arguments: list[str], output: Path | None, harness: Harness
) -> tuple[dict[str, dict[str, float]], Path]:
    """Score a model, and write the scores as JSON.

    Args:
        model: a checkpoint, a run folder or an exported folder.
        job_arguments: arguments of a checkpoint's job, which override the run's config.
        output: the file to write; None for evaluation.json in an exported folder, and for
            evaluation-step-N.json in the run folder of a checkpoint.
        harness: settings of the harness.

    Returns:
        The score of each task in percent, of the model and of the paper's runs at its size, and the
        file.

    Raises:
        ArgumentError: for tasks that the harness does not know, or that this model cannot do, and
            for an output that already exists.
        CheckpointError: for a checkpoint that cannot be read.
        ExportError: for a checkpoint that cannot be exported.
    """
    if harness.include_path and not harness.include_path.is_dir():
        raise ArgumentError(f"--include-path {harness.include_path}: there is no such folder")
    output = output or _default_output(model)
    if output.exists():
        raise ArgumentError(f"{output} already exists. Give another file with --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    with exported(model, job_arguments) as folder:
        results = run_harness(folder, harness)
    parameters = results["config"]["model_num_parameters"]
    scores, of_paper = _scores_of(results, harness.tasks), _scores_of_paper(parameters)
    content = {
        "model": os.fspath(model),
        "parameters": parameters,
        "limit": harness.limit,
        "scores (%)": scores,
        "paper (%)": of_paper,
        "harness": results,
    }
    output.write_text(json.dumps(content, indent=2, default=str) + "\n")
    rows = {os.fspath(model): scores}
    return rows | {f"paper: {name}": of_run for name, of_run in of_paper.items()}, output


def run_harness(folder: Path, harness: Harness) -> dict[str, Any]:
    """Return the harness's own 0-shot results for an exported folder.

    Raises:
        ArgumentError: for tasks that the harness does not know, or that this model cannot do.
    """
    path = harness.include_path
    try:
        manager = TaskManager(include_path=str(path) if path else None)
    except ValueError as error:  # in the YAML of a task
        raise ArgumentError(f"--include-path {path}: {error}") from error
    known = set(manager.all_tasks)
    if unknown := [task for task in harness.tasks if task not in known]:
        raise ArgumentError(
            f"--tasks {','.join(unknown)}: unknown to the harness. `lm_eval ls tasks` lists its "
            "tasks; --include-path FOLDER adds your own"
        )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = harness.device or str(accelerator or "cpu")
    return lm_eval.simple_evaluate(
        model=_load_model(folder, harness.batch_size, device),
        tasks=harness.tasks,
        num_fewshot=0,
        batch_size=harness.batch_size,
        limit=harness.limit,
        device=device,
        task_manager=manager,
        log_samples=False,
    )


class _Model(HFLM):
    """The harness's model, which also accepts a tokenizer without EOS."""

    @override
    def generate_until(self, *args: Any, **kwargs: Any) -> list[str]:
        if self.tokenizer.eos_token_id is None:
            raise ArgumentError(
                "--tasks: one of the tasks generates text up to the EOS token, and the model's "
                "tokenizer has none. Choose multiple-choice tasks"
            )
        return super().generate_until(*args, **kwargs)


def _load_model(folder: Path, batch_size: str, device: str) -> _Model:
    """Return the harness's model, also for a tokenizer without BOS or EOS.

    The harness assumes that there is an EOS token: as the end of generated text, and, without BOS,
    as the context of a text without context.
    """
    tokenizer = open_tokenizer(folder)
    options = {}
    if tokenizer.bos_id is None and tokenizer.eos_id is None:
        line_break = tokenizer.tokenizer.encode("\n", add_special_tokens=False).ids
        options["prefix_token_id"] = (line_break or [0])[-1]
        logging.warning(
            "The tokenizer has neither BOS nor EOS: texts without context get a line break as "
            "context"
        )
    try:
        return _Model(
            pretrained=str(folder),
            add_bos_token=tokenizer.bos_id is not None,  # in training, documents begin with BOS
            batch_size=batch_size,
            device=device,
            **options,
        )
    except ValueError as error:  # for example a model that transformers does not know
        raise ArgumentError(f"{folder}: {error}") from error


def _scores_of(results: dict[str, Any], tasks: list[str]) -> dict[str, float]:
    """Return the score of each task in percent, but not those of its parts, such as MMLU's 57."""
    scores = {}
    for task in tasks:
        values = results["results"].get(task, {})
        names = [METRICS[task]] if task in METRICS else ["acc_norm", "acc"]
        found = [values[f"{name},none"] for name in names if f"{name},none" in values]
        if found:
            scores[task] = 100 * found[0]
    return scores


def _scores_of_paper(parameters: int) -> dict[str, dict[str, float]]:
    """Return the rows of Table 3 for the model nearest in parameters: percent for each task."""
    nearest = paper.nearest_model(parameters)
    return {
        run.name: run.scores for run in paper.runs().values() if run.model == nearest and run.scores
    }


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Return rows of Table 3 as lines, and below them the first row's scores of other tasks."""
    columns = list(METRICS)
    cells = [
        [name, *(f"{scores[c]:.1f}" if c in scores else "-" for c in columns)]
        for name, scores in rows.items()
    ]
    lines = aligned([["", *columns], *cells])
    own = next(iter(rows.values()))
    return lines + [f"{task}: {score:.1f}" for task, score in own.items() if task not in METRICS]


def _default_output(model: Path) -> Path:
    if (model / "config.json").is_file():
        return model / "evaluation.json"
    checkpoint = find_checkpoint(model)
    return checkpoint.parent.parent / f"evaluation-{checkpoint.name}.json"
