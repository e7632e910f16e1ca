"""0-shot scores of a model on the paper's benchmarks, beside the paper's (Table 3).

    python scripts/evaluate_model.py outputs/270M/tst
    python scripts/evaluate_model.py EXPORTED_FOLDER --tasks arc_easy,piqa --limit 100

The LM-Eval harness does the work, and fetches its data from the Hugging Face hub the first time.
Needs the extra "eval". Further arguments are the job's, as in scripts/export_model.py.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from command_line import aligned, documented_parser
from export_model import exported, start_logging
from torchtitan.experiments.tst.checkpoint.files import CheckpointError
from torchtitan.experiments.tst.checkpoint.inventory import find_checkpoint
from torchtitan.experiments.tst.data.tokenizer import open_tokenizer
from torchtitan.experiments.tst.export import ExportError
from torchtitan.experiments.tst.planning import paper

# The columns of Table 3, and the metric of each. The paper does not say which metrics it took:
# these are the harness's length-normalised accuracies where it has them.
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


def evaluate(
    folder: Path,
    tasks: list[str],
    include_path: Path | None,
    batch_size: str,
    limit: int | None,
    device: str,
) -> dict[str, Any]:
    """The harness's results, 0-shot, as it gives them.

    Args:
        folder: an exported one.
        tasks: names that the harness knows.
        include_path: a folder with further tasks, YAML.
        batch_size: sequences, or "auto".
        limit: documents of each task; None for all.
        device: as torch names it.

    Raises:
        ValueError: for tasks that the harness does not know, or that this model cannot do.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path else None)
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise ValueError(
            f"--tasks {','.join(unknown)}: unknown to the harness; `lm_eval ls tasks` lists what "
            "it knows, --include-path FOLDER adds your own"
        )
    return lm_eval.simple_evaluate(
        model=_load_model(folder, batch_size, device),
        tasks=tasks,
        num_fewshot=0,
        batch_size=batch_size,
        limit=limit,
        device=device,
        task_manager=manager,
        log_samples=False,
    )


def _load_model(folder: Path, batch_size: str, device: str) -> Any:
    """The harness's model, also for a tokenizer without BOS or EOS.

    The harness takes EOS for granted: as the end of what it lets a model write, and, without BOS,
    as the context of what has none.
    """
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        def generate_until(self, *args: Any, **kwargs: Any) -> list[str]:
            if self.tokenizer.eos_token_id is None:
                raise ValueError(
                    "--tasks: one lets the model write text, which ends with the EOS token, and "
                    "the model's tokenizer has none; choose tasks of multiple choice"
                )
            return super().generate_until(*args, **kwargs)

    tokenizer = open_tokenizer(folder)
    options = {}
    if tokenizer.bos_id is None and tokenizer.eos_id is None:
        line_break = tokenizer.tokenizer.encode("\n", add_special_tokens=False).ids
        options["prefix_token_id"] = (line_break or [0])[-1]
        logging.warning(
            "The tokenizer has neither BOS nor EOS: a line break is the context of what has none"
        )
    return Model(
        pretrained=str(folder),
        add_bos_token=tokenizer.bos_id is not None,  # documents begin so in training
        batch_size=batch_size,
        device=device,
        **options,
    )


def scores_of(results: dict[str, Any], tasks: list[str]) -> dict[str, float]:
    """Percent for each of ``tasks``, without those that they are made of, such as MMLU's 57."""
    scores = {}
    for task in tasks:
        values = results["results"].get(task, {})
        names = [METRICS[task]] if task in METRICS else ["acc_norm", "acc"]
        found = [values[f"{name},none"] for name in names if f"{name},none" in values]
        if found:
            scores[task] = 100 * found[0]
    return scores


def rows_of_paper(parameters: int) -> dict[str, dict[str, float]]:
    """Table 3's rows of the model nearest in its number of parameters: percent for each task."""
    nearest = paper.nearest_model(parameters)
    return {
        run.name: run.scores for run in paper.runs().values() if run.model == nearest and run.scores
    }


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Rows of Table 3 by name; below them what the first has of other tasks."""
    columns = list(METRICS)
    cells = [
        [name, *(f"{scores[c]:.1f}" if c in scores else "-" for c in columns)]
        for name, scores in rows.items()
    ]
    lines = aligned([["", *columns], *cells])
    own = next(iter(rows.values()))
    return lines + [f"{task}: {score:.1f}" for task, score in own.items() if task not in METRICS]


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("model", type=Path, help="checkpoint, run folder or exported folder")
    parser.add_argument(
        "--tasks",
        default=",".join(METRICS),
        help="of the harness, separated by commas; default: %(default)s",
    )
    parser.add_argument(
        "--include-path", type=Path, metavar="FOLDER", help="further tasks, in the harness's YAML"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON; default: evaluation.json in an exported folder, of a checkpoint "
        "evaluation-step-N.json in its run folder",
    )
    parser.add_argument("--batch-size", default="auto", help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="documents of each task, for a quick try")
    parser.add_argument("--device", help="default: the accelerator, or cpu")
    args, job_args = parser.parse_known_args()
    start_logging()
    try:
        import lm_eval  # noqa: F401
        import torch
        import transformers
    except ImportError:
        sys.exit('error: the LM-Eval harness is missing: pip install -e ".[eval]"')
    transformers.logging.set_verbosity_error()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = args.device or str(accelerator or "cpu")
    try:
        if args.include_path and not args.include_path.is_dir():
            raise ValueError(f"--include-path {args.include_path}: no such folder")
        tasks = args.tasks.split(",")
        output = args.output or _default_output(args.model)
        if output.exists():
            raise ValueError(f"{output} is there already; give another with --output")
        output.parent.mkdir(parents=True, exist_ok=True)
        with exported(args.model, job_args) as folder:
            results = evaluate(
                folder,
                tasks,
                args.include_path,
                args.batch_size,
                args.limit,
                device,
            )
    except (CheckpointError, ExportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    parameters = results["config"]["model_num_parameters"]
    scores, of_paper = scores_of(results, tasks), rows_of_paper(parameters)
    rows = {os.fspath(args.model): scores}
    rows |= {f"paper: {name}": of_run for name, of_run in of_paper.items()}
    print("\n".join(table(rows)))
    if args.limit:
        print(f"Of the first {args.limit} documents of each task only")
    content = {
        "model": os.fspath(args.model),
        "parameters": parameters,
        "limit": args.limit,
        "scores (%)": scores,
        "paper (%)": of_paper,
        "harness": results,
    }
    output.write_text(json.dumps(content, indent=2, default=str) + "\n")
    print(f"results: {output}")


def _default_output(model: Path) -> Path:
    if (model / "config.json").is_file():
        return model / "evaluation.json"
    checkpoint = find_checkpoint(model)
    return checkpoint.parent.parent / f"evaluation-{checkpoint.name}.json"


if __name__ == "__main__":
    main()
