"""Stages of a pipeline on fake tensors.

A stage gets its shapes as examples, because no other rank can send them. It simulates only some
micro-batches: the others change the memory like the second one.
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

# A stage keeps outputs for backward in states; torch before 2.15, in the tuples of fwd_cache.
_HAS_STATES = torch.__version__ >= "2.15"


class NotRepeatableError(Exception):
    """Micro-batches are not alike, because the schedule divides backward (zero bubble)."""


class SimulatedStage(PipelineStage):
    """A stage that simulates the first two micro-batches of a step and the last."""

    def begin(
        self, tracker: PeakMemory, tokens: torch.Tensor, hidden: torch.Tensor, repeats: bool
    ) -> None:
        """Prepare for a step, and forget the one before; arguments as for :func:`begin_step`."""
        self.tracker, self.hidden, self.repeats = tracker, hidden, repeats
        self.output = hidden  # the first forward replaces it
        self.changes: dict[str, Change] = {}  # changes of the second micro-batch, by operation
        ranks = self.stage_index_to_group_rank  # set by the schedule
        PipelineStage.__init__(
            self,
            self.submod,
            self.stage_index,
            self.num_stages,
            torch.device("cpu"),  # to a fake tensor, "cpu:0" is another device
            input_args=tokens if self.is_first else hidden,
            output_args=hidden,
            group=self.group,
        )
        self.stage_index_to_group_rank = ranks

    def is_simulated(self, chunk: int) -> bool:
        """Return whether a micro-batch is simulated and not only counted."""
        return not self.repeats or chunk in (0, 1, (self.chunks or 0) - 1)

    def simulate(self, operation: str, chunk: int, function: Callable[[], Any]) -> Any:
        """Simulate an operation of a micro-batch, and record its change of the memory."""
        with self.tracker.observed() as change:
            result = function()
        if chunk == 1:  # now gradients exist, and with FSDP parameters are gathered
            self.changes[operation] = change
        return result

    def repeat(self, operation: str, example: torch.Tensor | None = None) -> torch.Tensor:
        """Count an operation like that of the second micro-batch, and return its result.

        Args:
            operation: name of the operation.
            example: example of the result, which the schedule sends and frees; None if it has none.
        """
        with self.tracker.observed() as there:
            shape, dtype = ((0,), None) if example is None else (example.shape, example.dtype)
            result = torch.empty(shape, dtype=dtype)
        self.tracker.repeat(self.changes[operation].without(there))
        return result

    @override
    def forward_one_chunk(self, chunk: int, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.chunk = chunk
        if not self.is_simulated(chunk):
            output = self.repeat("forward", self.output)
            self._keep((output,), chunk)
            return output
        forward = super().forward_one_chunk
        output = self.simulate("forward", chunk, lambda: forward(chunk, *args, **kwargs))
        local = output.to_local() if isinstance(output, DTensor) else output
        with unseen():
            self.output = torch.empty(local.shape, dtype=local.dtype, device="meta")
        kinds = [(tensor.dtype, tensor.shape) for tensor in (output, self.hidden)]
        if not self.is_last and kinds[0] != kinds[1]:
            raise RuntimeError(f"stage {self.stage_index} returns {kinds[0]}, expected {kinds[1]}")
        return output

    @override
    def backward_one_chunk(self, chunk: int, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        if self.repeats and not kwargs.get("full_backward", True):
            raise NotRepeatableError("backward of weights comes later")
        _kept = self._kept(chunk)  # the schedule keeps it, too, until its next forward
        if self.is_simulated(chunk):
            backward = super().backward_one_chunk
            self.simulate("backward", chunk, lambda: backward(chunk, *args, **kwargs))
            return
        del self._chunks()[chunk]
        gradient = self.repeat("backward", None if self.is_first else self.hidden)
        self.bwd_cache[chunk] = (gradient,)

    def _chunks(self) -> dict[int, Any]:
        stage: Any = self  # its type has only one of them
        return stage._forward_chunk_states if _HAS_STATES else stage.fwd_cache

    def _keep(self, outputs: tuple[torch.Tensor, ...], chunk: int) -> None:
        stage: Any = self
        make = stage._make_forward_chunk_state if _HAS_STATES else lambda *kept: kept
        self._chunks()[chunk] = make(outputs, [])

    def _kept(self, chunk: int) -> tuple[torch.Tensor | None, ...]:
        kept = self._chunks()[chunk]
        return tuple(kept.live_outputs) if _HAS_STATES else kept[0]

    # in torch 2.13 and 2.14, all ranks vote on whether shapes are known

    def _warmup_forward_vote(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([1], dtype=torch.int32)

    def _warmup_backward_result(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([1], dtype=torch.int32)

    @override
    def _post_metadata_inference_cleanup(self) -> None:
        """Do nothing: the gradients come from earlier micro-batches, not from shape inference."""

    # torch before 2.13 compares inputs and outputs with the examples, even in the last stage

    def _validate_fwd_input(self, *args: Any) -> None:
        pass

    def _validate_fwd_outputs(self, *args: Any) -> None:
        pass


class _Loss:
    """The loss of the micro-batch whose forward the last stage has just computed."""

    def __init__(self, stage: SimulatedStage, compute: Callable[..., torch.Tensor]):
        self.stage, self.compute = stage, compute

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.stage.is_simulated(self.stage.chunk):
            return self.stage.simulate(
                "loss", self.stage.chunk, lambda: self.compute(*args, **kwargs)
            )
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
        schedule: schedule whose stages are :class:`SimulatedStage`.
        tracker: tracker of the step's memory.
        tokens: example of the first stage's input.
        hidden: example of the hidden states between two stages.
        repeats: whether to simulate only the first two micro-batches and the last.
    """
    forget_shapes(schedule)
    for stage in [schedule._stage] if hasattr(schedule, "_stage") else schedule._stages:
        stage.begin(tracker, tokens, hidden, repeats)
        if stage.is_last and not isinstance(schedule._loss_fn, _Loss):
            schedule._loss_fn = _Loss(stage, schedule._loss_fn)
