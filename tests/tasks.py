"""Small tasks of the LM-Eval harness."""

import json
from pathlib import Path
from typing import Any

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
target_delimiter: ""
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOICES = """\
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""
TEXT = """\
doc_to_target: "{{answer}}"
generation_kwargs:
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""


def write_task(
    folder: Path,
    name: str,
    data: list[dict[str, Any]],
    kind: str = "multiple_choice",
    rest: str = CHOICES,
) -> None:
    """Write a task of the harness, and the records it asks about."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in data))
    task = TASK.format(name=name, data=path, kind=kind) + rest
    (folder / f"{name}.yaml").write_text(task)
