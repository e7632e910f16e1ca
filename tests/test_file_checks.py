"""Files that are not what their name says are recognized by their first bytes."""

from pathlib import Path

import pytest

from torchtitan.experiments.tst.file_checks import what_is_wrong

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\n\n ", "zeros or blanks"),
        (bytes(5000), "zeros or blanks"),
        (POINTER.encode(), "git lfs pull"),
        (b"../.git/annex/objects/xx/yy/SHA256E-s12--00.safetensors\n", "git annex get"),
        (b"<!DOCTYPE html>\n<html><title>Sign in</title>", "is a web page"),
        (b"\xef\xbb\xbf\n<!-- a\nb -->\n<HTML lang='en'>", "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    ],
)
def test_what_downloads_and_clones_leave(tmp_path, content, expected):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    assert expected in what_is_wrong(path)


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"<|endoftext|>\n<html-like>\n",  # a vocabulary
        b"#version: 0.2\na b\n",
        b"@\0\0\0\0\0\0\0{}",  # begins as safetensors do
    ],
)
def test_contents_to_which_there_is_nothing_to_say(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert what_is_wrong(path) is None


def test_what_cannot_be_opened(tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to("blobs/00")
    assert what_is_wrong(link) == "is a link to blobs/00, which does not exist"
    assert what_is_wrong(tmp_path / "none") == "cannot be read: No such file or directory"
    assert what_is_wrong(tmp_path) == "cannot be read: Is a directory"

    def deny(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)  # as root, who may run this, may read any file
    assert what_is_wrong(tmp_path / "file") == "cannot be read: Permission denied"
