"""Text datasets added to upstream's registry, all of which stream; importing this module adds them.

``training.dataset_path`` names local files in their place: a file, a folder, or a pattern. With
upstream's own trainer:
``--experimental.custom_import torchtitan.experiments.tst.data.datasets``.

The names and fields are those of the Hugging Face hub in 2026. Records are read for their ``text``
alone: the other fields differ from file to file (DCLM's ``metadata``; the ``date`` that some of
FineWeb-Edu's dumps have), which ``datasets`` would refuse.
"""

import functools
import glob
import json
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

JSONL = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz")
PARQUET = (".parquet",)


def data_files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that a file, a folder, a pattern or a URL stands for, in order.

    Args:
        path: of a folder, all files in it and below with one of the suffixes.
        suffixes: such as ".jsonl".

    Raises:
        FileNotFoundError: if there are none.
    """
    if "://" in path:
        return [path]
    if Path(path).is_dir():
        files = [str(p) for p in Path(path).rglob("*") if p.name.endswith(suffixes)]
    else:
        files = [path] if Path(path).exists() else glob.glob(path, recursive=True)  # noqa: PTH207
    if not files:
        raise FileNotFoundError(f"no such file, and no folder with {', '.join(suffixes)} files")
    return sorted(files)


def _load_jsonl(path: str) -> IterableDataset:
    # as lines of text: the reader of JSON wants all records alike
    files = data_files(path, JSONL)
    return load_dataset("text", data_files=files, split="train", streaming=True)


def _load_parquet(path: str) -> IterableDataset:
    files = data_files(path, PARQUET)
    return load_dataset(
        "parquet", data_files=files, columns=["text"], split="train", streaming=True
    )


def _text_of_json(sample: dict[str, Any]) -> str:
    line = sample["text"]
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"not a JSON object with a field `text`: {line[:100]!r}") from error
    if not isinstance(text, str):
        raise ValueError(f"its field `text` is not a string: {line[:100]!r}")
    return text


def _text(sample: dict[str, Any]) -> str:
    return sample["text"]


_jsonl = functools.partial(DatasetConfig, loader=_load_jsonl, sample_processor=_text_of_json)
_parquet = functools.partial(DatasetConfig, loader=_load_parquet, sample_processor=_text)
_DCLM = "hf://datasets/mlfoundations/dclm-baseline-1.0"
_FINEWEB_EDU = "hf://datasets/HuggingFaceFW/fineweb-edu"

# beside upstream's c4 (allenai/c4, en), c4_validation and c4_test
OURS = {
    "jsonl": _jsonl(path=""),
    "parquet": _parquet(path=""),
    "dclm": _jsonl(path=f"{_DCLM}/global-shard_*/local-shard_*/*.jsonl.zst"),
    "fineweb_edu": _parquet(path=f"{_FINEWEB_EDU}/data/*/*.parquet"),
    "fineweb_edu_10bt": _parquet(path=f"{_FINEWEB_EDU}/sample/10BT/*.parquet"),
    "fineweb_edu_100bt": _parquet(path=f"{_FINEWEB_EDU}/sample/100BT/*.parquet"),
    "fineweb_edu_350bt": _parquet(path=f"{_FINEWEB_EDU}/sample/350BT/*.parquet"),
}
DATASETS |= OURS


def check_files(dataset: str, path: str) -> None:
    """Check that a dataset's local files are there.

    Raises:
        FileNotFoundError: if not.
    """
    if dataset in OURS and path:
        data_files(path, JSONL if OURS[dataset].loader is _load_jsonl else PARQUET)
    elif not path or not ("://" in path or Path(path).exists()):
        raise FileNotFoundError("no such file or folder")
