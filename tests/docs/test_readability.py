"""scripts/check_docs.py finds long sentences and the phrases to avoid."""

import pytest

import check_docs

PAGE = """# A heading of no account

One two three four. Five six seven: `some code` nine, e.g. ten!
A [link of words](https://example.org/x.html) ends
on the next line.

| a table | of many words that are not counted at all |
| --- | --- |

- An item
- Another item with **bold words**. And more

```text
code. more code. yet more code.
```
"""


def test_sentences():
    assert check_docs.sentences(PAGE) == [
        "One two three four.",
        "Five six seven: code nine, e.g ten!",
        "A link of words ends on the next line.",
        "An item",
        "Another item with bold words.",
        "And more",
    ]
    assert check_docs.mean_words(PAGE) == pytest.approx((4 + 7 + 9 + 2 + 5 + 2) / 6)


@pytest.mark.parametrize(
    "text",
    ["a job comes to rest", "It Goes on", "which is left\n    # out", "the layer\nof  which it"],
)
def test_phrases(tmp_path, text):
    path = tmp_path / "module.py"
    path.write_text(f"# first line\n{text}\n")
    (finding,) = check_docs.phrases(path)
    assert finding.line in (2, 3)


@pytest.mark.parametrize("text", ["This becomes true", "a coming goesonward", "he rests besides"])
def test_other_words(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text)
    assert not check_docs.phrases(path)


def test_a_page_of_long_sentences_fails(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    monkeypatch.setattr(check_docs, "tracked", lambda *paths: [page])
    for words, code in ((17, 0), (18, 1)):
        page.write_text("word " * (words - 1) + "end.\n")
        assert check_docs.main([]) == code
    assert "page.md:1: sentences have 18.0 words" in capsys.readouterr().out
