"""Open a tokenizer: upstream's class, without the settings that would change documents.

Every part of this package opens its tokenizer here. So tokenizing a corpus and tokenizing while
training give the same ids.
"""

import codecs
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer, build_hf_tokenizer
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger, warn_once
from typing_extensions import override

from ..errors import ConfigError, UserError
from ..file_checks import what_is_wrong
from .tokenizer_identity import entries

_TOKENIZER, _CONFIG, _MERGES = "tokenizer.json", "tokenizer_config.json", "merges.txt"
_VOCABULARIES = ("vocab.json", "vocab.txt")  # in upstream's order
_CONVERT = (
    "Convert it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER) "
    f"writes {_TOKENIZER}"
)
_RARE = "\U00012000"  # a cuneiform sign, which only vocabularies of bytes have


class TokenizerError(UserError, ValueError):
    """A folder without a usable tokenizer; the message goes after the folder's name."""


def open_tokenizer(folder: str | os.PathLike) -> HuggingFaceTokenizer:
    """Open the tokenizer of a folder, such as ``model.hf_assets_path``.

    Truncation, padding and BPE dropout are switched off, with a warning if they would change token
    ids. If BOS and EOS are the same token, ``eos_id`` is set, and a document has the token at its
    beginning only, as with upstream's class.

    Args:
        folder: folder with the files that upstream reads: ``tokenizer.json``, or a vocabulary and
            ``merges.txt``; and ``tokenizer_config.json``.

    Raises:
        TokenizerError: if a file is missing or wrong; names the file and says what to do.
    """
    tokenizer = _WholeDocuments(Path(folder))
    _check_unknown_text(tokenizer.tokenizer, tokenizer.file)
    if (highest := max(tokenizer.encode("a", add_bos=True, add_eos=True), default=0)) >= (
        count := entries(tokenizer)
    ):
        raise TokenizerError(
            f"{tokenizer.file.name}: its post-processor adds id {highest} to documents, but the "
            f"vocabulary has {count:,} entries; correct the ids of its special tokens"
        )
    return tokenizer


def build_tokenizer(job_config: JobConfig) -> HuggingFaceTokenizer:
    """Build a job's tokenizer, as ``TrainSpec.build_tokenizer_fn``.

    Raises:
        ConfigError: if ``model.hf_assets_path`` has no usable tokenizer.
    """
    folder = job_config.model.hf_assets_path
    try:
        return open_tokenizer(folder)
    except TokenizerError as error:
        raise ConfigError("model.hf_assets_path", folder, str(error)) from error


def tokenizer_builder(
    of_spec: Callable[[JobConfig], BaseTokenizer] | None,
) -> Callable[[JobConfig], BaseTokenizer] | None:
    """Return :func:`build_tokenizer` for upstream's function, and any other unchanged."""
    return build_tokenizer if of_spec is build_hf_tokenizer else of_spec


def announce_tokenizer(tokenizer: BaseTokenizer | None) -> None:
    """Log the size of a tokenizer, and the tokens at the beginning and end of a document."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return
    before, after = _around_documents(tokenizer)
    logger.info(
        f"Tokenizer: {entries(tokenizer):,} entries; a document begins with "
        f"{_names(tokenizer, before)} and ends with {_names(tokenizer, after)}"
    )
    if not before and not after:
        logger.warning(
            f"{tokenizer.tokenizer_path}: the tokenizer adds no token before or after a document, "
            "so nothing separates documents in training. Set bos_token or eos_token in its "
            f"{_CONFIG} if it has such a token"
        )


def _around_documents(tokenizer: HuggingFaceTokenizer) -> tuple[list[int], list[int]]:
    """Return the token ids that are added before and after the text of a document."""
    probe = "Some words, and 12 more."
    whole = tokenizer.encode(probe, add_bos=True, add_eos=True)
    text = tokenizer.tokenizer.encode(probe, add_special_tokens=False).ids
    for start in range(len(whole) - len(text) + 1):
        if text and whole[start : start + len(text)] == text:
            return whole[:start], whole[start + len(text) :]
    return whole, []


def _names(tokenizer: HuggingFaceTokenizer, ids: list[int]) -> str:
    return " ".join(f"{tokenizer.id_to_token(i)} ({i})" for i in ids) or "no token"


class _WholeDocuments(HuggingFaceTokenizer):
    """Upstream's tokenizer class, without the settings that change documents."""

    def __init__(self, folder: Path):
        self._files = _check_files(folder)
        self.file = folder / self._files[0]
        super().__init__(str(folder))

    @override
    def _load_tokenizer_from_path(self, tokenizer_path: str) -> Tokenizer:
        with _blaming(self.file.parent, self._files):
            tokenizer = super()._load_tokenizer_from_path(tokenizer_path)
        _switch_off(tokenizer, self.file)
        return tokenizer

    @override
    def _load_config(self, config_path: str) -> dict[str, Any] | None:
        with _blaming(self.file.parent, [_CONFIG]):
            config = super()._load_config(config_path)
            if not isinstance(config, dict | None):
                raise TypeError
        return config

    @override
    def _infer_special_tokens(self) -> None:
        before = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        with _blaming(self.file.parent, [_CONFIG]):
            super()._infer_special_tokens()
            eos_token = self.config and self._get_token_from_config(self.config, "eos_token")
        if eos_token and eos_token == self.bos_token:  # upstream would set BOS only
            self.eos_token, self.eos_id = self.bos_token, self.bos_id
        added = [
            f"{token.content} ({i})"
            for i, token in self.tokenizer.get_added_tokens_decoder().items()
            if token.content not in before
            and self.tokenizer.model.token_to_id(token.content) is None
        ]
        if added:
            warn_once(
                logger,
                f"{self.file.parent / _CONFIG}: these special tokens are not in the vocabulary and "
                f"are added to it: {', '.join(added)}",
            )

    @override
    def _infer_should_add_bos_eos(self) -> None:
        super()._infer_should_add_bos_eos()
        if self.eos_id is not None and self.eos_id == self.bos_id:
            self.hf_adds_eos = True  # do not add the same token twice


def _switch_off(tokenizer: Tokenizer, file: Path) -> None:
    """Switch truncation, padding and dropout off; warn if they would change token ids."""

    def warn(setting: str, effect: str) -> None:
        warn_once(logger, f"{file}: {setting} is switched off here; it would {effect}")

    if truncation := tokenizer.truncation:
        tokenizer.no_truncation()
        warn(f"truncation (max_length {truncation['max_length']})", "cut documents off")
    if padding := tokenizer.padding:
        tokenizer.no_padding()
        length, multiple = padding["length"], padding["pad_to_multiple_of"]
        if length or multiple:  # else it pads to the longest of a batch: nothing for one document
            which = f"length {length}" if length else f"to a multiple of {multiple}"
            warn(f"padding ({which})", f"add {padding['pad_token']} to documents")
    model: Any = tokenizer.model
    if dropout := getattr(model, "dropout", None):
        model.dropout = None
        if getattr(tokenizer.model, "dropout", None):
            raise TokenizerError(
                f"{file.name}: set dropout of the BPE model to null (it is {dropout}), because it "
                "makes token ids random"
            )
        warn(f"BPE dropout ({dropout:.3g})", "make token ids random")


def _check_unknown_text(tokenizer: Tokenizer, file: Path) -> None:
    """Check that text outside the vocabulary can be encoded; warn if it would be dropped."""
    try:
        once, often = (tokenizer.encode(_RARE * times).ids for times in (1, 3))
    except Exception as error:  # the library has no class for its errors
        raise TokenizerError(
            f"{file.name} cannot encode text outside its vocabulary ({error}); set the model's "
            "unk_token (unk_id of a Unigram model) to an entry of the vocabulary"
        ) from error
    model = tokenizer.model
    if not isinstance(model, BPE) or model.unk_token is not None:
        return
    missing = (
        [byte for byte in ByteLevel.alphabet() if tokenizer.token_to_id(byte) is None]
        if "ByteLevel" in str(tokenizer.pre_tokenizer)
        else []
    )
    if once == often or missing:
        which = f" ({len(missing)} of the 256 bytes are not in it)" if missing else ""
        warn_once(
            logger,
            f"{file}: characters outside the vocabulary{which} are dropped from documents, "
            "because the model has no unk_token; set one to keep them",
        )


def _check_files(folder: Path) -> list[str]:
    """Return the files that upstream reads the tokenizer from, the vocabulary first.

    Raises:
        TokenizerError: if they are missing, or one has not the content that its name says.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        raise TokenizerError(_no_folder(folder)) from None
    except OSError as error:
        raise TokenizerError(f"the folder cannot be read: {error.strerror}") from error
    files = _files(names)
    if not files:
        raise TokenizerError(_no_files(names))
    if files[0] in _VOCABULARIES and _MERGES not in names:
        raise TokenizerError(
            f"has {files[0]} without {_MERGES} and {_TOKENIZER}, so TorchTitan would treat each "
            f"document as one word. {_CONVERT}"
        )
    for name in files + [_CONFIG] * (_CONFIG in names):
        if wrong := what_is_wrong(folder / name):
            raise TokenizerError(f"{name} {wrong}")
    if _MERGES in files:
        for number, line in enumerate((folder / _MERGES).read_bytes().splitlines(), 1):
            if not line.strip() or (number == 1 and line.startswith(b"#version")):
                continue
            if line.startswith(b"#"):
                raise TokenizerError(
                    f"{_MERGES}, line {number}: TorchTitan reads the merge {line[:40]!r} as a "
                    f"comment. {_CONVERT}"
                )
            if len(line.split()) != 2:  # upstream would skip it
                raise TokenizerError(
                    f"{_MERGES}, line {number} is not a merge of two tokens: {line[:40]!r}; "
                    "download the file again"
                )
    return files


def _files(names: set[str]) -> list[str]:
    """Return those of the names that upstream reads a tokenizer from, the vocabulary first."""
    if _TOKENIZER in names:
        return [_TOKENIZER]
    found = [name for name in _VOCABULARIES if name in names][:1]
    return found + [_MERGES] * (bool(found) and _MERGES in names)


def _no_folder(path: Path) -> str:
    """Return the error for a path that is not a folder."""
    if not path.is_file():
        return "no such folder (of a tokenizer); download one with `tst assets`"
    parent = path.absolute().parent
    names = {sibling.name for sibling in parent.iterdir()}
    if _files(names):
        return f"is a file; give its folder, {parent}"
    return f"is a file, but must be a folder; {parent} {_no_files(names)}"


def _no_files(names: set[str]) -> str:
    """Return the error for a folder without a tokenizer that upstream can read."""
    models = sorted(name for name in names if name.endswith(".model"))
    if models:
        return (
            f"has {', '.join(models)} (SentencePiece or tiktoken), but TorchTitan needs "
            f"{_TOKENIZER}. {_CONVERT}"
        )
    found = ", ".join(sorted(names)[:10]) + (", ..." if len(names) > 10 else "")
    return (
        f"has no tokenizer: no {_TOKENIZER}, and no {' or '.join(_VOCABULARIES)} with {_MERGES}. "
        f"It has {found or 'no files'}. Download one with `tst assets`"
    )


@contextmanager
def _blaming(folder: Path, names: list[str]) -> Iterator[None]:
    """Turn an error of the library into one that names the file, and what is wrong with it."""
    try:
        yield
    except Exception as error:  # the library has no class for its errors
        raise TokenizerError(_fault(folder, names, error)) from error


def _fault(folder: Path, names: list[str], error: Exception) -> str:
    """Return what is wrong with the files of a tokenizer that cannot be opened."""
    for name in names:
        if not name.endswith(".json"):
            continue
        content = (folder / name).read_bytes()
        if content.startswith(codecs.BOM_UTF8):
            return f"{name} begins with a byte order mark; save it as UTF-8 without one"
        try:
            parsed = json.loads(content)
        except ValueError as damage:
            return f"{name} is not JSON ({damage}); it begins with {content[:40]!r}"
        if not isinstance(parsed, dict):
            return f"{name} must be a JSON object; it begins with {content[:40]!r}"
    listed = " and ".join(names)
    if names == [_CONFIG]:
        return f"{listed}: {error}"
    return (
        f"{listed} cannot be loaded with tokenizers {tokenizers.__version__} ({error}); download "
        "it again, or upgrade tokenizers if a newer version wrote it"
    )
