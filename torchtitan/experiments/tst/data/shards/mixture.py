"""One order of windows over several sources of tokens, by weight.

For each window every source is credited its share of the window's tokens, and the one with the
highest credit gives the window and pays for it. So the sources take turns as evenly as windows
allow, at any moment and without a random number: what comes next depends on the position alone.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .token_shards import TokenShards


class Window(NamedTuple):
    """A window of tokens: the source's number and the position in its endless sequence."""

    source: int
    position: int


@dataclass(frozen=True)
class Position:
    """A place in the mixture.

    Attributes:
        tokens: read from each source since the start of the run; past its end they repeat.
        credits: tokens owed to each source.
    """

    tokens: tuple[int, ...]
    credits: tuple[float, ...]

    def to_json(self) -> str:
        """As JSON, exact."""
        return json.dumps({"tokens": self.tokens, "credits": self.credits})

    @classmethod
    def from_json(cls, text: str) -> "Position":
        """The inverse of :meth:`to_json`."""
        fields = json.loads(text)
        return cls(tuple(fields["tokens"]), tuple(fields["credits"]))


class Mixture:
    """Sources of tokens and their weights.

    Args:
        sources: at least one.
        weights: of the sources, of any sum; none for each source's number of tokens.
        repeat: begin a source anew at its end; otherwise the data ends when one does.

    Attributes:
        shares: of the tokens, by source; their sum is 1.
        names: of the sources, no two alike.
    """

    def __init__(
        self, sources: list[TokenShards], weights: list[float] | None = None, repeat: bool = True
    ):
        self.sources, self.repeat = sources, repeat
        weights = weights or [float(source.tokens) for source in sources]
        self.shares = [weight / sum(weights) for weight in weights]
        self.names = [source.name for source in sources]
        if len(set(self.names)) < len(sources):
            self.names = [str(source.folder.resolve()) for source in sources]

    def start(self) -> Position:
        """The beginning of every source."""
        return Position((0,) * len(self.sources), (0.0,) * len(self.sources))

    def take(self, position: Position, count: int, length: int) -> tuple[list[Window], Position]:
        """The next ``count`` windows of ``length`` tokens, and the position after them.

        Fewer windows if a source ends and does not repeat; the position is then of no use.
        """
        tokens, credits, windows = list(position.tokens), list(position.credits), []
        gains = [share * length for share in self.shares]
        for _ in range(count):
            credits = [credit + gain for credit, gain in zip(credits, gains, strict=True)]
            source = credits.index(max(credits))
            if not self.repeat and tokens[source] + length > self.sources[source].tokens:
                break
            windows.append(Window(source, tokens[source]))
            tokens[source] += length
            credits[source] -= length
        return windows, Position(tuple(tokens), tuple(credits))

    def read(self, windows: list[Window], length: int) -> np.ndarray:
        """The windows' tokens, (windows, length), int64.

        Raises:
            ShardError: from :meth:`.token_shards.TokenShards.read`.
        """
        tokens = np.empty((len(windows), length), np.int64)
        for number, source in enumerate(self.sources):
            rows = [row for row, window in enumerate(windows) if window.source == number]
            if rows:  # windows of one source follow each other in it
                first = windows[rows[0]].position
                tokens[rows] = source.read(first, len(rows) * length).reshape(-1, length)
        return tokens
