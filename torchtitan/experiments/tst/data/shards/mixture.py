"""Mix several sources of tokens into one order of windows, by weight.

For each window, every source gets a credit of its share of the window's tokens. The source with the
highest credit provides the window, and its credit is reduced by the window's tokens. So the sources
take turns as evenly as whole windows allow, at any moment and without random numbers. The next
window depends on the position alone.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .token_shards import TokenShards


class Window(NamedTuple):
    """A window of tokens: the number of its source, and its position in the endless sequence."""

    source: int
    position: int


@dataclass(frozen=True)
class Position:
    """A position in the mixture.

    Attributes:
        tokens: number of tokens read from each source since the start of the run; past the end of a
            source they repeat.
        credits: credit of each source in tokens.
    """

    tokens: tuple[int, ...]
    credits: tuple[float, ...]

    def to_json(self) -> str:
        """Return the position as JSON, which is exact."""
        return json.dumps({"tokens": self.tokens, "credits": self.credits})

    @classmethod
    def from_json(cls, text: str) -> "Position":
        """Return the position in a text of :meth:`to_json`."""
        fields = json.loads(text)
        return cls(tuple(fields["tokens"]), tuple(fields["credits"]))


class Mixture:
    """A mixture of sources of tokens, with a weight for each.

    Args:
        sources: at least one source.
        weights: weight of each source, with any sum; by default its number of tokens.
        repeat: restart a source at its end; otherwise the data ends when one source ends.

    Attributes:
        shares: share of each source in the tokens; the sum is 1.
        names: name of each source; all are different.
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
        """Return the position at the beginning of every source."""
        return Position((0,) * len(self.sources), (0.0,) * len(self.sources))

    def check(self, position: Position) -> None:
        """Check that a position, such as that of a checkpoint, is one in this mixture.

        Raises:
            ValueError: if it has another number of sources.
        """
        if (sources := len(position.tokens)) != len(self.sources):
            raise ValueError(
                f"the checkpoint's position is in a mixture of {sources} sources, but the config "
                f"has {len(self.sources)}; set checkpoint.exclude_from_loading = ['dataloader'] to "
                "restart the data from its beginning"
            )

    def take(self, position: Position, count: int, length: int) -> tuple[list[Window], Position]:
        """Return the next windows, and the position after them.

        Args:
            position: where to start.
            count: number of windows.
            length: tokens of a window.

        Returns:
            ``count`` windows; fewer if a source ends and does not repeat. In that case, the
            position is not valid.
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
        """Read the tokens of windows, int64 (windows, length).

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
