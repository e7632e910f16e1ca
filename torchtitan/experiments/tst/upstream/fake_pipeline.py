"""Stages of a pipeline on tensors without content.

A stage gets its shapes as examples, because no other rank can send them. It plays few
micro-batches: those in between change the memory as the second does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes as unseen
from typing_extensions import override

from .fake import Change, PeakMemory
from .parallelize import forget_shapes


class NotRepeatableError(Exception):
    """Micro-batches are not alike: the schedule divides backward, as those without bubbles do."""


class PlayedStage(PipelineStage):
    """A stage that plays the first two micro-batches of a step and the last."""

    def begin(
        self, tracker: PeakMemory, tokens: torch.Tensor, hidden: torch.Tensor, repeats: bool
    ) -> None:
        """Forget the step before; arguments as for :func:`begin_step`."""
        self.tracker, self.hidden, self.repeats = tracker, hidden, repeats
        self.output = hidden  # the last stage's own, once it is known
        self.changes: dict[str, Change] = {}  # of the second micro-batch, by operation
        ranks = self.stage_index_to_group_rank  # as the schedule has set it
        PipelineStage.__init__(
            self,
            self.submod,
            self.stage_index,
            self.num_stages,
            torch.device("cpu"),  # "cpu:0" is another to a fake tensor
            input_args=tokens if self.is_first else hidden,
            output_args=hidden,
            group=self.group,
        )
        self.stage_index_to_group_rank = ranks

    def is_played(self, chunk: int) -> bool:
        """Whether a micro-batch is played, and not counted only."""
        return not self.repeats or chunk in (0, 1, (self.chunks or 0) - 1)

    def play(self, operation: str, chunk: int, function: Callable[[], Any]) -> Any:
        """Play an operation of a micro-batch, and keep how it changes the memory."""
        with self.tracker.observed() as change:
            result = function()
        if chunk == 1:  # gradients are there and, with FSDP, gathered parameters
            self.changes[operation] = change
        return result

    def repeat(self, operation: str, example: torch.Tensor | None = None) -> torch.Tensor:
        """Count an operation as the second micro-batch's, and return its result.

        Args:
            operation: that it has had, too.
            example: of the result, which the schedule sends and frees; None if it has none.
        """
        with self.tracker.observed() as there:
            shape, dtype = ((0,), None) if example is None else (example.shape, example.dtype)
            result = torch.empty(shape, dtype=dtype)
        self.tracker.repeat(self.changes[operation].without(there))
        return result

    @override
    def forward_one_chunk(self, chunk: int, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.chunk = chunk
        if not self.is_played(chunk):
            output = self.repeat("forward", self.output)
            self.fwd_cache[chunk] = ((output,), [])
            return output
        forward = super().forward_one_chunk
        output = self.play("forward", chunk, lambda: forward(chunk, *args, **kwargs))
        local = output.to_local() if isinstance(output, DTensor) else output
        with unseen():
            self.output = torch.empty(local.shape, dtype=local.dtype, device="meta")
        kinds = [(tensor.dtype, tensor.shape) for tensor in (output, self.hidden)]
        if not self.is_last and kinds[0] != kinds[1]:
            raise RuntimeError(f"stage {self.stage_index} gives {kinds[0]}, expected {kinds[1]}")
        return output

    @override
    def backward_one_chunk(self, chunk: int, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        if self.repeats and not kwargs.get("full_backward", True):
            raise NotRepeatableError("backward of weights comes later")
        _kept = self.fwd_cache[chunk][0]  # by the schedule, too, until its next forward
        if self.is_played(chunk):
            backward = super().backward_one_chunk
            self.play("backward", chunk, lambda: backward(chunk, *args, **kwargs))
            return
        del self.fwd_cache[chunk]
        gradient = self.repeat("backward", None if self.is_first else self.hidden)
        self.bwd_cache[chunk] = (gradient,)

    # torch 2.13 has all ranks vote on whether shapes are known

    @override
    def _warmup_forward_vote(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([1], dtype=torch.int32)

    @override
    def _warmup_backward_result(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([1], dtype=torch.int32)

    @override
    def _post_metadata_inference_cleanup(self) -> None:
        """Keep gradients of micro-batches before: no inference has left any."""

    # torch before 2.13 compares inputs and outputs with the examples, those of the last stage, too

    def _validate_fwd_input(self, *args: Any) -> None:
        pass

    def _validate_fwd_outputs(self, *args: Any) -> None:
        pass


class _Loss:
    """The loss of the micro-batch that the last stage has gone forward with."""

    def __init__(self, stage: PlayedStage, compute: Callable[..., torch.Tensor]):
        self.stage, self.compute = stage, compute

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.stage.is_played(self.stage.chunk):
            return self.stage.play("loss", self.stage.chunk, lambda: self.compute(*args, **kwargs))
        self.stage.repeat("loss")
        return torch.zeros(())


def begin_step(
    schedule: Any,
    tracker: PeakMemory,
    tokens: torch.Tensor,
    hidden: torch.Tensor,
    repeats: bool,
) -> None:
    """Make the stages of a pipeline schedule ready for a step.

    Args:
        schedule: whose stages are :class:`PlayedStage`.
        tracker: of the step's memory.
        tokens: input of the first stage, an example without content.
        hidden: output of each stage but the last and input of each but the first, as an example.
        repeats: whether to play the first two micro-batches and the last only.
    """
    forget_shapes(schedule)
    for stage in [schedule._stage] if hasattr(schedule, "_stage") else schedule._stages:
        stage.begin(tracker, tokens, hidden, repeats)
        if stage.is_last and not isinstance(schedule._loss_fn, _Loss):
            schedule._loss_fn = _Loss(stage, schedule._loss_fn)
