"""Datasets added to upstream's registry; importing this module adds them.

With upstream's own trainer:
``--experimental.custom_import torchtitan.experiments.tst.data.datasets``.
"""

from typing import Any

from datasets import Dataset, load_dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS


def _load_jsonl(path: str) -> Dataset:
    return load_dataset("json", data_files=path, split="train")


def _text(sample: dict[str, Any]) -> str:
    return sample["text"]


# Local JSON lines, one document a line in the field "text"; training.dataset_path names the file.
DATASETS["jsonl"] = DatasetConfig(path="", loader=_load_jsonl, sample_processor=_text)
