"""Tokenizer files as people have them: opened so that documents stay whole, or refused by name."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.protocols.train_spec import get_train_spec

from corpora import documents, prepare_here, tokenize, write_jsonl
from torchtitan.experiments.tst.data.shards.tokenization import Options, TokenizationError
from torchtitan.experiments.tst.data.tokenizer import (
    TokenizerError,
    announce_tokenizer,
    open_tokenizer,
)
from torchtitan.experiments.tst.data.tokenizer_identity import checksum
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.training.train_spec import superposition_train_spec
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
TEXTS = ["def main():\n    return 'some words, more than eight tokens of them'", "x", "two words"]


@pytest.fixture
def folder(corpus, tmp_path) -> Path:
    """A copy of the small corpus's tokenizer."""
    return shutil.copytree(corpus / "tokenizer", tmp_path / "assets")


def ids(tokenizer):
    return [tokenizer.encode(text, add_bos=True, add_eos=True) for text in TEXTS]


def change(folder, edit):
    """Change the tokenizer in tokenizer.json."""
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    edit(tokenizer)
    tokenizer.save(path)


def add_dropout(tokenizer):
    tokenizer.model.dropout = 0.5


SETTINGS = {
    "truncation": (lambda t: t.enable_truncation(8), "truncation (max_length 8)"),
    "padding": (lambda t: t.enable_padding(length=32), "padding (length 32)"),
    # encode("") has the token of the padding then: upstream takes it for an EOS of the tokenizer's
    "padding with EOS": (
        lambda t: t.enable_padding(length=32, pad_id=1, pad_token=EOS),
        "padding (length 32)",
    ),
    "padding to a multiple": (
        lambda t: t.enable_padding(pad_to_multiple_of=16),
        "padding (to a multiple of 16)",
    ),
    "padding of a batch": (lambda t: t.enable_padding(), None),
    "dropout": (add_dropout, "BPE dropout (0.5)"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_that_change_documents_are_off_on_both_paths(
    corpus, folder, tmp_path, caplog, make_config, setting
):
    edit, warning = SETTINGS[setting]
    plain = HuggingFaceTokenizer(str(corpus / "tokenizer"))
    expected = ids(plain)
    change(folder, edit)
    opened = open_tokenizer(folder)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [warning in text for text in warnings] == [True] * bool(warning)
    assert all(str(folder / "tokenizer.json") in text for text in warnings)
    assert ids(opened) == expected
    assert checksum(opened) == checksum(plain)

    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    tokenize(source, tmp_path / "out", Options(str(folder), shuffle="none"))
    assert documents(tmp_path / "out") == expected

    tokens = [token for document in expected for token in document]
    config = make_config(
        *(f"--model.hf_assets_path={folder}", f"--training.dataset_path={source}"),
        *("--training.local_batch_size=1", f"--training.seq_len={len(tokens) - 1}"),
    )
    spec = superposition_train_spec(get_train_spec("llama3"), config, run=None)
    loader = spec.build_dataloader_fn(1, 0, spec.build_tokenizer_fn(config), config)
    inputs, labels = next(iter(loader))
    assert [*inputs["input"][0].tolist(), labels[0, -1].item()] == tokens


def test_dropout_that_cannot_be_switched_off_is_refused(folder, monkeypatch):
    change(folder, add_dropout)
    kept = property(lambda self: 0.5, lambda self, value: None)
    monkeypatch.setattr(Tokenizer, "model", type("Model", (), {"dropout": kept})())
    with pytest.raises(TokenizerError, match=r"^tokenizer.json: set dropout .* to null"):
        open_tokenizer(folder)


def write_config(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_bos_that_is_eos_begins_documents_and_is_known_as_eos(folder, tmp_path):
    write_config(folder, bos_token=EOS, eos_token={"content": EOS, "__type": "AddedToken"})
    upstream, opened = HuggingFaceTokenizer(str(folder)), open_tokenizer(folder)
    assert (opened.eos_token, opened.bos_id, opened.eos_id) == (EOS, 1, 1)
    assert ids(opened) == ids(upstream)
    assert ids(opened)[1] == [1, *opened.encode("x")]
    assert checksum(opened) == checksum(upstream), "shards made before are this tokenizer's"
    tokenize(
        write_jsonl(tmp_path / "a.jsonl", TEXTS),
        tmp_path / "out",
        Options(str(folder), shuffle="none"),
    )
    assert documents(tmp_path / "out") == ids(upstream)


def begin_and_end(tokenizer):
    names = [(name, tokenizer.token_to_id(name)) for name in ("a", "b")]
    tokenizer.post_processor = processors.TemplateProcessing(single="a $A b", special_tokens=names)


@pytest.mark.parametrize(
    ("config", "edit", "expected"),
    [
        ({"bos_token": BOS, "eos_token": EOS}, None, f"{BOS} (0) and ends with {EOS} (1)"),
        ({"bos_token": EOS, "eos_token": EOS}, None, f"{EOS} (1) and ends with no token"),
        ({"eos_token": EOS}, None, f"no token and ends with {EOS} (1)"),
        ({}, begin_and_end, "a (66) and ends with b (67)"),
        ({"bos_token": BOS}, begin_and_end, f"{BOS} (0) a (66) and ends with b (67)"),
        (None, None, "no token and ends with no token"),
    ],
)
def test_the_log_says_what_documents_begin_and_end_with(folder, caplog, config, edit, expected):
    caplog.set_level("INFO")
    (folder / "tokenizer_config.json").unlink()
    if config is not None:
        write_config(folder, **config)
    if edit:
        change(folder, edit)
    announce_tokenizer(open_tokenizer(folder))
    line = f"Tokenizer: 1,024 entries; a document begins with {expected}"
    assert line in caplog.messages
    nothing = [text for text in caplog.messages if "nothing separates documents" in text]
    assert len(nothing) == (config is None)


def test_a_run_logs_its_tokenizer(train, folder, caplog):
    caplog.set_level("INFO")
    (folder / "tokenizer_config.json").unlink()
    train(f"--model.hf_assets_path={folder}", "--training.steps=1")
    for part in ("Tokenizer: 1,024 entries; ", "nothing separates documents"):
        assert len([text for text in caplog.messages if part in text]) == 1


def test_special_tokens_that_enlarge_the_vocabulary(folder, caplog, make_config):
    write_config(
        folder,
        bos_token=BOS,
        eos_token="<new>",
        added_tokens_decoder={"1": {"content": EOS}, "7": {"content": "<newer>"}},
    )
    opened = open_tokenizer(folder)
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert warning.startswith(f"{folder / 'tokenizer_config.json'}: ")
    assert warning.endswith("are added to it: <new> (1024), <newer> (1025)")
    assert opened.encode("x<new>", add_bos=True, add_eos=True)[-1] == 1024
    with pytest.raises(ConfigError, match=r"1,026 entries, more than the 1,024 of model.flavor"):
        SuperpositionTrainer(make_config(f"--model.hf_assets_path={folder}"))


def test_text_outside_the_vocabulary(folder, caplog):
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(folder / "tokenizer.json"))
    open_tokenizer(folder)
    assert "characters outside the vocabulary are dropped" in caplog.text
    caplog.clear()
    whole_bytes = shutil.copytree(folder, folder.parent / "bytes")
    model = models.BPE({"[UNK]": 0, "a": 1}, [], unk_token="[UNK]")
    Tokenizer(model).save(str(whole_bytes / "tokenizer.json"))
    open_tokenizer(whole_bytes)
    assert "dropped" not in caplog.text
    Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"^tokenizer.json cannot encode text .*unk_token"):
        open_tokenizer(folder)


def test_bytes_that_are_not_in_the_vocabulary(folder, caplog):
    """As of a byte-level BPE that was trained without ByteLevel.alphabet()."""

    def forget_bytes(tokenizer):
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        kept = [byte for byte in sorted(alphabet) if byte.isascii()]
        tokenizer.model = models.BPE({byte: n for n, byte in enumerate(kept)}, [])

    open_tokenizer(folder)
    assert "dropped" not in caplog.text
    change(folder, forget_bytes)
    open_tokenizer(folder)
    assert "162 of the 256 bytes are not in it) are dropped" in caplog.text


def put(**contents):
    """What puts these files into the folder in the place of all others."""

    def edit(folder):
        for path in folder.iterdir():
            path.unlink()
        for name, content in contents.items():
            path = folder / name.replace("__", ".")
            path.write_text(content)
        return folder

    return edit


def with_config(content):
    def edit(folder):
        (folder / "tokenizer_config.json").write_text(content)
        return folder

    return edit


def with_post_processor_id(number):
    def edit(folder):
        def add(tokenizer):
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", number)]
            )

        change(folder, add)
        return folder

    return edit


def cut_off(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:5000])
    return folder


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
PAGE = "<!DOCTYPE html>\n<html>\n"
VOCABULARY = '{"a": 0, "b": 1, "ab": 2}'

DAMAGES = {
    "no folder": (lambda folder: folder / "none", ["no such folder"]),
    "below a file": (lambda folder: folder / "tokenizer.json" / "x", ["no such folder"]),
    "tokenizer.json itself": (
        lambda folder: folder / "tokenizer.json",
        ["is a file; give its folder, ", "/assets"],
    ),
    "another model itself": (
        lambda folder: put(spiece__model="x")(folder) / "spiece.model",
        ["is a file, but must be a folder", "save_pretrained"],
    ),
    "SentencePiece": (put(tokenizer__model="x"), ["has tokenizer.model", "save_pretrained"]),
    "no files": (put(), ["has no tokenizer", "It has no files"]),
    "other files": (put(config__json="{}"), ["has no tokenizer", "It has config.json"]),
    "a pointer": (put(tokenizer__json=POINTER), ["tokenizer.json is a Git LFS pointer"]),
    "a page": (put(tokenizer__json=PAGE), ["tokenizer.json is a web page"]),
    "an empty file": (put(tokenizer__json=""), ["tokenizer.json is empty"]),
    "no JSON": (put(tokenizer__json="Entry not found"), ["tokenizer.json is not JSON", "Entry"]),
    "a file cut off": (cut_off, ["tokenizer.json is not JSON"]),
    "no object": (put(tokenizer__json="[]"), ["tokenizer.json must be a JSON object"]),
    "no tokenizer": (put(tokenizer__json='{"model_type": "llama"}'), ["tokenizer.json cannot be"]),
    "a byte order mark": (put(tokenizer__json="\ufeff{}"), ["tokenizer.json begins with a byte"]),
    "a config that is a pointer": (with_config(POINTER), ["tokenizer_config.json is a Git LFS"]),
    "a config that is empty": (with_config(""), ["tokenizer_config.json is empty"]),
    "a config that is no JSON": (with_config("{"), ["tokenizer_config.json is not JSON"]),
    "a config that is no object": (with_config("[1]"), ["tokenizer_config.json must be a JSON"]),
    "a BOS that is no token": (with_config('{"bos_token": 1}'), ["tokenizer_config.json: ", "bos"]),
    "a vocabulary of words": (put(vocab__txt="a\nb\n"), ["vocab.txt without merges.txt"]),
    "a vocabulary that is a pointer": (
        put(vocab__txt=POINTER, merges__txt="a b\n"),
        ["vocab.txt is a Git LFS pointer"],
    ),
    "a vocabulary that is a page": (
        put(vocab__json=PAGE, merges__txt="a b\n"),
        ["vocab.json is a web page"],
    ),
    "a vocabulary that is no object": (
        put(vocab__json="[1]", merges__txt="a b\n"),
        ["vocab.json must be a JSON object"],
    ),
    "merges that are a pointer": (
        put(vocab__json=VOCABULARY, merges__txt=POINTER),
        ["merges.txt is a Git LFS pointer"],
    ),
    "merges that are empty": (
        put(vocab__json=VOCABULARY, merges__txt=""),
        ["merges.txt is empty"],
    ),
    "merges that are none": (
        put(vocab__json=VOCABULARY, merges__txt="#version: 0.2\na b\n{}\n"),
        ["merges.txt, line 3 is not a merge"],
    ),
    "merges that TorchTitan takes for comments": (
        put(vocab__json=VOCABULARY, merges__txt="#version: 0.2\na b\n# #\n"),
        ["merges.txt, line 3: TorchTitan reads the merge b'# #' as a comment", "save_pretrained"],
    ),
    "a post-processor with ids of another vocabulary": (
        with_post_processor_id(99999),
        ["tokenizer.json: its post-processor adds id 99999", "1,024 entries"],
    ),
    "merges of another vocabulary": (
        put(vocab__json=VOCABULARY, merges__txt="c d\n"),
        ["vocab.json and merges.txt cannot be loaded", "out of vocabulary"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_wrong_paths_are_told_apart(folder, make_config, tmp_path, damage):
    edit, expected = DAMAGES[damage]
    path = edit(folder)
    with pytest.raises(ConfigError) as error:
        # without a launch's environment, which anything past the checks would ask for
        SuperpositionTrainer(make_config(f"--model.hf_assets_path={path}"))
    message = str(error.value)
    assert message.startswith(f"model.hf_assets_path = {str(path)!r}: ")
    for part in expected:
        assert part in message
    with pytest.raises(TokenizationError) as of_corpus:
        prepare_here(tmp_path / "a.jsonl", tmp_path / "out", Options(str(path)))
    assert str(of_corpus.value) == message.replace("model.hf_assets_path", "tokenizer")


@pytest.mark.parametrize("key", ["hf_assets_path", "tokenizer_path"])
def test_a_tokenizer_model_of_former_days(folder, make_config, key):
    """Of which upstream's config manager raises an Exception."""
    path = folder / "tokenizer.model"
    path.write_text("x")
    with pytest.raises(ConfigError, match=r"^model.hf_assets_path = '.*/tokenizer.model': must be"):
        make_config(f"--model.{key}={path}")


def test_folders_that_may_not_be_read(folder, monkeypatch):
    def deny(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", deny)  # as root, who may run this, may read any folder
    with pytest.raises(TokenizerError, match=r"^the folder cannot be read: Permission denied"):
        open_tokenizer(folder)


def test_vocabulary_and_merges(folder):
    put(vocab__json=VOCABULARY, merges__txt="#version: 0.2\n\na b\n")(folder)
    assert open_tokenizer(folder).encode("abb") == [2, 1]
