"""Sources take turns by weight, from any position on, and end as asked."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpora import write_shards
from torchtitan.experiments.tst.data.shards.mixture import Mixture, Position
from torchtitan.experiments.tst.data.shards.token_shards import TokenShards


class Source:
    """Tokens that say where they come from."""

    def __init__(self, number, tokens=10**9, name=None):
        self.name, self.folder, self.tokens = (
            name or f"source-{number}",
            Path(f"/folder-{number}"),
            tokens,
        )
        self.first = number * 10**12

    def read(self, position, count):
        return self.first + np.arange(position, position + count)


def mixture(weights, tokens=10**9, **options):
    return Mixture([Source(n, tokens) for n in range(len(weights))], weights, **options)


weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)
lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 500)), min_size=1, max_size=8)


@given(weights, lengths)
def test_shares_are_held_at_any_moment(weights, steps):
    mix = mixture(weights)
    position = mix.start()
    longest = 0
    for count, length in steps:
        longest = max(longest, length)
        for _ in range(count):
            _, position = mix.take(position, 1, length)
            for tokens, share in zip(position.tokens, mix.shares, strict=True):
                assert abs(tokens - share * sum(position.tokens)) <= len(weights) * longest


@given(weights, lengths, st.data())
def test_what_comes_next_depends_on_the_position_alone(weights, steps, data):
    mix = mixture(weights)
    windows, position = [], mix.start()
    parts, resumed = [], mix.start()
    for count, length in steps:
        taken, position = mix.take(position, count, length)
        windows += taken
        cut = data.draw(st.integers(0, count))
        for part in (cut, count - cut):  # saved in between
            resumed = Position.from_json(resumed.to_json())
            taken, resumed = mixture(weights).take(resumed, part, length)
            parts += taken
    assert parts == windows
    assert resumed == position
    for source in range(len(weights)):
        starts = [window.position for window in windows if window.source == source]
        assert starts == sorted(set(starts))


@given(weights, st.integers(0, 2**41))
def test_rounding_does_not_add_up(weights, read):
    """10^8 windows, as many as 2 trillion tokens have, stay within 0.02 tokens of the shares."""
    mix, count, length = mixture(weights), 500, 65537
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    start = Position((read,) * len(weights), (0.0,) * len(weights))
    _, position = mix.take(start, count, length)
    for tokens, credit, share in zip(position.tokens, position.credits, shares, strict=True):
        owed = share * count * length - (tokens - read)
        assert abs(owed - Fraction(credit)) <= count * 2**-33


def test_equal_weights_alternate():
    windows, position = mixture([2, 2]).take(Position((0, 0), (0.0, 0.0)), 4, 10)
    assert [window.source for window in windows] == [0, 1, 0, 1]
    assert position == Position((20, 20), (0.0, 0.0))


def test_windows_are_read_in_their_order():
    mix = mixture([3, 1])
    _, position = mix.take(mix.start(), 5, 7)
    windows, _ = mix.take(position, 6, 4)
    rows = mix.read(windows, 4)
    for row, (source, start) in zip(rows, windows, strict=True):
        assert (row == source * 10**12 + np.arange(start, start + 4)).all()


def test_a_source_ends_or_repeats():
    short, _ = mixture([1, 1], tokens=25, repeat=False).take(Position((0, 0), (0, 0)), 9, 10)
    assert [window.position for window in short] == [0, 0, 10, 10]
    repeated, position = mixture([1, 1], tokens=25).take(Position((0, 0), (0, 0)), 9, 10)
    assert len(repeated) == 9
    assert position.tokens == (50, 40)


def test_repeated_tokens_are_the_sources(tmp_path):
    source = TokenShards(write_shards(tmp_path, [[[1, 2, 3]], [[4, 5]]]))
    mix = Mixture([source])
    windows, _ = mix.take(mix.start(), 4, 3)
    assert mix.read(windows, 3).tolist() == [[1, 2, 3], [4, 5, 1], [2, 3, 4], [5, 1, 2]]


def test_without_weights_all_sources_end_together():
    mix = Mixture([Source(0, 300), Source(1, 100)])
    assert mix.shares == [0.75, 0.25]


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("a", "b"), ["a", "b"]), (("a", "a"), ["/folder-0", "/folder-1"])],
)
def test_names_are_different(names, expected):
    assert Mixture([Source(n, name=name) for n, name in enumerate(names)]).names == expected
