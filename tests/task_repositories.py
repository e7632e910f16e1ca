"""Dataset repositories of the LM-Eval harness's tasks, with few made-up questions.

Each question is there once for each of its answers. So a task's accuracy is 1 / choices.
"""

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pyarrow
import pyarrow.parquet
import yaml

INSTALLED = Path(lm_eval.tasks.__file__).parent  # the harness's own tasks
LETTERS = "ABCD"
ENDINGS = ["a stone.", "two of the boats.", "def main", "import sys"]


def choices(question_column: str) -> list[dict]:
    """Return questions in the columns of ARC and OpenBookQA."""
    choices = {"text": ENDINGS, "label": list(LETTERS)}
    question = {"id": "Q1", question_column: "What floats on water?", "choices": choices}
    return [question | {"answerKey": letter} for letter in LETTERS]


HELLASWAG = [
    {
        "ind": 1,
        "activity_label": "Rowing",
        "ctx_a": "A man [header] sits in a boat.",
        "ctx_b": "he",
        "ctx": "A man [header] sits in a boat. he",
        "endings": ENDINGS,
        "source_id": "activitynet~1",
        "split": "val",
        "split_type": "indomain",
        "label": str(label),
    }
    for label in range(4)
]
MMLU = [
    {"question": "What floats?", "subject": "water", "choices": ENDINGS, "answer": answer}
    for answer in range(4)
]
BOOLQ = [
    {"question": "do boats float", "passage": "Boats are made of wood.", "idx": 0, "label": label}
    for label in (0, 1)
]
PIQA = [
    {"goal": "Cross the water", "sol1": "Take a boat.", "sol2": "Take a stone.", "label": label}
    for label in (0, 1)
]
WINOGRANDE = [
    {
        "sentence": "The boat hit the stone, and the _ sank.",
        "option1": "boat",
        "option2": "stone",
        "answer": answer,
    }
    for answer in ("1", "2")
]
LAMBADA = [{"text": "The boat hit the stone, and then it was the boat that sank"}]


def write_repository(
    folder: Path,
    name: str,
    configs: dict[str, list[dict[str, Any]]],
    splits: tuple[str, ...] = ("train", "validation", "test"),
    kind: str = "parquet",
) -> Path:
    """Write a dataset repository as `hf download --local-dir` leaves it.

    Args:
        folder: the folder of all repositories.
        name: the repository's name on the hub.
        configs: the rows of each config, which are the same in each split.
        splits: the splits.
        kind: "parquet" or "jsonl".

    Returns:
        The folder of the repository.
    """
    repository = folder / name
    card = []
    for config, rows in configs.items():
        data = repository / ("data" if config == "default" else config)
        data.mkdir(parents=True)
        for split in splits:
            path = data / f"{split}-00000-of-00001.{kind}"
            if kind == "parquet":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = [{"split": split, "path": f"{data.name}/{split}-*"} for split in splits]
        card.append({"config_name": config, "data_files": files})
    header = yaml.safe_dump({"language": ["en"], "configs": card})
    (repository / "README.md").write_text(f"---\n{header}---\n\n# Dataset card\n")
    download = repository / ".cache/huggingface/download"  # hf's own record of the download
    download.mkdir(parents=True)
    (download / "README.md.metadata").write_text("0123abcd\n")
    return repository


def write_papers_data(folder: Path) -> None:
    """Write the repositories of the paper's eight tasks, with their columns and configs."""
    write_repository(folder, "Rowan/hellaswag", {"default": HELLASWAG})
    arc = choices("question")
    write_repository(folder, "allenai/ai2_arc", {"ARC-Challenge": arc, "ARC-Easy": arc})
    subjects = [path.stem.removeprefix("mmlu_") for path in INSTALLED.glob("mmlu/default/mmlu_*")]
    assert len(subjects) == 57
    mmlu = dict.fromkeys(sorted(subjects), MMLU)
    write_repository(folder, "cais/mmlu", mmlu, splits=("test", "validation", "dev"))
    write_repository(folder, "aps/super_glue", {"boolq": BOOLQ})
    openbook = choices("question_stem")
    write_repository(folder, "allenai/openbookqa", {"additional": openbook, "main": openbook})
    write_repository(folder, "allenai/winogrande", {"winogrande_xl": WINOGRANDE})
    piqa = folder / "baber/piqa"  # without a README.md, as on the hub
    piqa.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        table = pyarrow.Table.from_pylist(PIQA)
        pyarrow.parquet.write_table(table, piqa / f"piqa_{split}.parquet")


def take_task(folder: Path, yaml_path: str, **settings: Any) -> None:
    """Write a task that comes with the harness as one of --include-path.

    So the thousands of others need not be read.
    """
    folder.mkdir(exist_ok=True)
    name = yaml.safe_load((INSTALLED / yaml_path).read_text().replace("!function", ""))["task"]
    task = {"include": str(INSTALLED / yaml_path), "task": name, **settings}
    (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
