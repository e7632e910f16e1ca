"""Tokenize a corpus once with datatrove, into the tokens that upstream's text path would make.

    documents -> tokens, one shard per task -> shuffled within the task -> (optionally, all shards
    merged into one order) -> ``corpus.json``, which says that the folder is complete

The output folder has the shards (:mod:`.token_shards`), ``corpus.json`` and datatrove's ``logs/``.
An interrupted tokenization resumes with the unfinished tasks. A task writes the same shard each
time it runs.
"""

import dataclasses
import fcntl
import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger
from datatrove.utils.stats import MetricStats
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from typing_extensions import override

from ..tokenizer import TokenizerError, announce_tokenizer, open_tokenizer
from ..tokenizer_identity import entries, label
from .token_shards import CORPUS_FILE, read_shards
from .tokenization_input import TokenizationError, build_reader, list_inputs
from .tokenization_options import Options

TOKENIZE = "tokenize"  # the first of two pipelines
LOCKS = "locks"  # in the logs of the first: a file for each task that started on this machine
_LOGS, _PARTS, _INPUTS = "logs", "parts", "inputs.txt"


class UpstreamTokenizer(DocumentTokenizer):
    """Datatrove's tokenization step with upstream's BOS and EOS."""

    name = "Tokens of upstream's text path"

    def __init__(self, folder: Path, options: Options):
        assets = open_tokenizer(options.tokenizer)
        super().__init__(
            str(folder),
            tokenizer_name_or_path=label(Path(options.tokenizer).name, assets),
            shuffle_documents=options.shuffle != "none",
            shuffle_chunk_size=options.chunk_tokens if options.shuffle == "chunks" else None,
            max_tokens_per_file=None if options.merge else options.shard_tokens,
            seed=options.seed,
            batch_size=1000,
        )
        self.assets_path = options.tokenizer

    @cached_property
    @override
    def tokenizer(self) -> "_Encoder":
        return _Encoder(open_tokenizer(self.assets_path))

    @cached_property
    @override
    def token_size(self) -> int:
        return 2 if entries(self.tokenizer.upstream) <= 2**16 else 4


class _Encoder:
    """The part of a ``tokenizers.Tokenizer`` that datatrove uses, with upstream's BOS and EOS."""

    def __init__(self, upstream: HuggingFaceTokenizer):
        self.upstream = upstream
        adds_bos = upstream.bos_id is not None and not upstream.hf_adds_bos
        adds_eos = upstream.eos_id is not None and not upstream.hf_adds_eos
        self.before = [upstream.bos_id] if adds_bos else []
        self.after = [upstream.eos_id] if adds_eos else []

    def encode_batch(self, texts: list[str]) -> list[SimpleNamespace]:
        """Encode each text, as ``upstream.encode(text, add_bos=True, add_eos=True)`` would."""
        encodings = self.upstream.tokenizer.encode_batch_fast(texts)
        return [SimpleNamespace(ids=self.before + each.ids + self.after) for each in encodings]


class _Finish(PipelineStep):
    """The last step: merge the shards if asked to, check them, and write ``corpus.json``."""

    name = "Finish"

    def __init__(self, folder: Path, merger: DocumentTokenizerMerger | None):
        super().__init__()
        self.folder, self.merger = folder, merger

    @override
    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        content = read_corpus_file(self.folder)
        if content["complete"]:  # the step ran before; a cluster may run it again
            return
        if self.merger:
            _drop_empty(self.folder / _PARTS)
            self.merger.run()
        shards = {shard.path.name: shard.tokens for shard in read_shards(self.folder)}
        counted = _count(self.folder / _LOGS / TOKENIZE / "stats")
        tokens = sum(shards.values())
        content |= {
            "complete": True,
            "documents": counted.n,
            "tokens": tokens,
            "dropped_tokens": int(counted.total) - tokens,
            "shards": shards,
        }
        _write_corpus_file(self.folder, content)
        shutil.rmtree(self.folder / _PARTS, ignore_errors=True)


def _drop_empty(parts: Path) -> None:
    """Remove shards without tokens, because datatrove's merger cannot read them."""
    kept = {shard.path for shard in read_shards(parts)}
    for path in set(parts.glob("*.ds")) - kept:
        for file in parts.glob(f"{path.name}*"):
            file.unlink()


def _count(stats: Path) -> MetricStats:
    """Count tokens and documents (``n``) of all tasks, from datatrove's statistics."""
    counted = MetricStats()
    for file in stats.glob("*.json"):
        for step in json.loads(file.read_text()):
            if tokens := step["stats"].get("tokens"):
                counted += MetricStats.from_dict(tokens)
    return counted


def read_corpus_file(folder: Path) -> dict[str, Any]:
    """Return the content of ``corpus.json``; an empty dict if there is none.

    Raises:
        TokenizationError: if it is damaged.
    """
    path = folder / CORPUS_FILE
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise TokenizationError(f"{path} is damaged: {error}; remove {folder}") from error


def _write_corpus_file(folder: Path, content: dict[str, Any]) -> None:
    unfinished = folder / f"{CORPUS_FILE}.unfinished"
    unfinished.write_text(json.dumps(content, indent=2))
    unfinished.rename(folder / CORPUS_FILE)


def prepare(
    source: str, folder: Path, options: Options, make_executor: "MakeExecutor"
) -> list[PipelineExecutor]:
    """Return the executors of the work that is left, to be ``run()`` one after the other.

    Args:
        source: JSON lines or Parquet: a file, a folder, a pattern, a URL; or a dataset on the hub.
        folder: folder for the shards, an absolute path.
        options: how to tokenize.
        make_executor: called with the steps of a pipeline, its name, the number of tasks and the
            folder for the logs.

    Returns:
        The executors; empty if the corpus is complete.

    Raises:
        TokenizationError: if there is nothing to read, or the folder has another corpus.
    """
    _begin(source, folder, options)
    content = read_corpus_file(folder)
    parts = folder / _PARTS
    if content["complete"]:
        shutil.rmtree(parts, ignore_errors=True)  # an earlier launch may have been killed here
        return []
    dataset = {"name": options.hub_config, "split": options.hub_split}
    steps = [
        build_reader(source, folder / _LOGS / _INPUTS, options.text_key, dataset),
        UpstreamTokenizer(parts if options.merge else folder, options),
    ]
    finish = _Finish(folder, _merger(parts, folder, options) if options.merge else None)
    tasks, logs = content["settings"]["tasks"], folder / _LOGS
    return [
        make_executor(steps, TOKENIZE, tasks, logs / TOKENIZE),
        make_executor([finish], "finish", 1, logs / "finish"),
    ]


MakeExecutor = Callable[[list[PipelineStep], str, int, Path], PipelineExecutor]


def _begin(source: str, folder: Path, options: Options) -> None:
    """Write ``corpus.json`` and the list of inputs, which later launches use."""
    try:
        tokenizer = open_tokenizer(options.tokenizer)
    except TokenizerError as error:
        raise TokenizationError(f"tokenizer = {options.tokenizer!r}: {error}") from error
    announce_tokenizer(tokenizer)
    settings = {"source": source} | dataclasses.asdict(options)
    settings["tokenizer"] = label(Path(options.tokenizer).name, tokenizer)
    if content := read_corpus_file(folder):
        found = _difference(content["settings"], settings)
        if not found:
            return
        if content["complete"] or not _is_untouched(folder):
            key, value = found
            raise TokenizationError(
                f"{folder} has a corpus with {key} = {value!r}, not {settings[key]!r}; choose "
                "another folder, or remove this one"
            )
    else:
        began = {_LOGS, f"{CORPUS_FILE}.unfinished"}  # from a launch that was killed at its start
        if folder.exists() and {path.name for path in folder.iterdir()} - began:
            raise TokenizationError(
                f"{folder} is not empty and has no {CORPUS_FILE}; choose another folder"
            )
    files = list_inputs(source, options.text_key)
    settings["tasks"] = options.tasks or len(files) or 1
    if content:
        _clear(folder)
    (folder / _LOGS).mkdir(parents=True, exist_ok=True)
    (folder / _LOGS / _INPUTS).write_text("".join(f"{file}\n" for file in files))
    _write_corpus_file(folder, {"complete": False, "settings": settings, "shards": {}})


def _difference(earlier: dict[str, Any], settings: dict[str, Any]) -> tuple[str, Any] | None:
    """Return the first key with a different value now, and its earlier value; None without."""
    for key, value in earlier.items():
        if settings[key] != value and (key, settings[key]) != ("tasks", None):
            return key, value
    return None


def _is_untouched(folder: Path) -> bool:
    """Return whether an earlier launch wrote nothing, and no worker of it is running."""
    logs = folder / _LOGS / TOKENIZE
    began = [logs / "executor.pik"]  # submitted to a cluster
    began += (logs / "completions").glob("*")
    began += (path for path in folder.rglob("*.ds") if path.stat().st_size)
    return not any(path.exists() for path in began) and not any(
        map(_is_locked, (logs / LOCKS).glob("*"))
    )


def _is_locked(path: Path) -> bool:
    """Return whether a worker of an earlier launch is still at a task."""
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


def _clear(folder: Path) -> None:
    """Remove the files of an earlier launch that wrote nothing; ``corpus.json`` is replaced."""
    for path in (_LOGS, _PARTS):
        shutil.rmtree(folder / path, ignore_errors=True)
    for file in folder.glob("*.ds*"):
        file.unlink()


def _merger(parts: Path, folder: Path, options: Options) -> DocumentTokenizerMerger:
    return DocumentTokenizerMerger(
        str(parts),
        str(folder),
        save_filename="merged",
        max_tokens_per_file=options.shard_tokens or -1,
        shuffle=options.shuffle != "none",
        shuffle_chunk_size=options.chunk_tokens if options.shuffle == "chunks" else None,
        seed=options.seed,
    )
