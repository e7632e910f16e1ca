"""An implementation under check, and what several checks need of it."""

import math
from collections.abc import Callable
from functools import cached_property, partial

import torch

from .implementation import AfterStep, Batch, Implementation, InterfaceError
from .recording import Reference, Step, Wrong, compare, record
from .references import WEIGHTS, cross_entropy, fold, number

_LEAST = {"vocab_size": 32, "sequences": 2, "seq_len": 8, "bag_size": 2}


class Suite:
    """An implementation, and what several checks need of it."""

    def __init__(self, make: Callable[[], Implementation]):
        self.make, self.own = make, make()
        names = [*_LEAST, "weightings"]
        if missing := [name for name in names if not hasattr(self.own, name)]:
            raise InterfaceError(f"{type(self.own).__name__} has no {', '.join(missing)}")
        for name, least in _LEAST.items():
            if getattr(self.own, name) < least:
                raise InterfaceError(f"{name} = {getattr(self.own, name)} must be {least} or more")
        if unknown := sorted({*self.own.weightings} - {*WEIGHTS}):
            raise InterfaceError(f"weightings = {unknown} must be some of {', '.join(WEIGHTS)}")
        self.size, self.s = (self.own.sequences, self.own.seq_len), self.own.bag_size
        self.sizes = [self.s, self.s, 1, 1]
        self.stream = self.random(math.prod(self.size) * self.s * 8)
        self._failed: set[str] = set()  # trainings

    def random(self, *shape: int) -> torch.Tensor:
        """Return token ids, the same each time."""
        return torch.randint(self.own.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def random_logits(self) -> torch.Tensor:
        """Return logits (B, L, V), the same each time."""
        shape = (*self.size, self.own.vocab_size)
        return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def folded(self) -> tuple[torch.Tensor, Batch, Batch]:
        """Return rows of different token ids (B, L*s + 1), and their bags and targets.

        Bags and targets are once as they must be, and once as the implementation folds them.
        """
        b, length = self.size[0], self.size[1] * self.s
        rows = torch.arange(b * (length + 1)).unflatten(0, (b, -1))
        inputs, labels = rows[:, :-1], rows[:, 1:]
        bags, targets = self.own.fold(inputs, labels, self.s)
        return rows, fold(inputs, labels, self.s), (bags.cpu(), targets.cpu())

    @cached_property
    def phases(self) -> list[Step]:
        """Steps of both phases; ``seen`` is the validation loss, and what it must be."""
        own, held_out = self.make(), self.random(self.size[0], self.size[1] + 1)
        tokens, labels = held_out[:, :-1], held_out[:, 1:]

        def losses() -> tuple[float, float]:
            expected = cross_entropy(own.logits(tokens), labels)
            return number(own.validate(tokens, labels)), expected.item()

        return self._record("in both phases", partial(own.train, self.stream, self.sizes), losses)

    @cached_property
    def references(self) -> list[Reference]:
        """What the steps of both phases must be."""
        return compare(self.make(), self.stream, self.sizes, self.phases)

    @cached_property
    def bag_size_1(self) -> list[Step]:
        """As many steps with bags of one token."""
        train = partial(self.make().train, self.stream, [1] * len(self.sizes))
        return self._record("with bag size 1", train)

    @cached_property
    def ordinary(self) -> list[Step]:
        """As many steps of the engine without TST."""
        train = partial(self.make().train_ordinary, self.stream, len(self.sizes))
        return self._record("without TST", train)

    def _record(
        self,
        name: str,
        train: Callable[[AfterStep], None],
        look: Callable[[], object] = lambda: None,
    ) -> list[Step]:
        if name in self._failed:
            raise Wrong(f"This is not checked, because the training {name} fails. See above.")
        self._failed.add(name)
        steps = record(train, look)
        if len(steps) != len(self.sizes):
            raise Wrong(
                f"A training of {len(self.sizes)} steps calls after_step {len(steps)} times. Call "
                "it once for each optimizer step, with all its micro-batches."
            )
        if any(step.inputs.ndim != 2 for step in steps):
            shape = (*steps[0].inputs.shape,)
            raise Wrong(f"after_step gets tokens {shape}. Give those before folding, (B, T).")
        if not all(step.after.weights for step in steps):
            raise Wrong(
                "No optimizer of torch.optim steps before after_step is called, so nothing can be "
                "compared."
            )
        self._failed.remove(name)
        return steps
