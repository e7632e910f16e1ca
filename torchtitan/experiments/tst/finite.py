"""No optimizer step on numbers that are not finite, without a wait for the device.

A step's loss and gradient norm are judged where they are, and a fused optimizer leaves the step
out by itself (what torch made for ``GradScaler``). The host reads of it later, when the device has
moved on: at the next step, or before it would write a checkpoint. Any other optimizer has to be
held back by the host, which then waits for each step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchtitan.components.optimizer import OptimizersContainer, OptimizersInBackwardContainer
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_module, device_type


class NonFiniteError(RuntimeError):
    """A loss or gradient norm that is not finite; the optimizer's step was not taken."""


@dataclass(frozen=True)
class _Numbers:
    """Of a step, on their way to the host.

    Attributes:
        step: as messages name it.
        lr: its learning rate.
        of_ranks: loss and gradient norm of each rank, (ranks, 2).
        arrival: of ``of_ranks``; None if they are there.
    """

    step: str
    lr: float
    of_ranks: torch.Tensor
    arrival: torch.Event | None

    def read(self) -> torch.Tensor:
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.of_ranks


class FiniteCheck:
    """Leaves out the optimizer's step where a number is not finite, up to a number of steps.

    Attributes:
        skipped: steps of the run left out so far, as far as :meth:`settle` has read.
    """

    def __init__(
        self,
        optimizers: OptimizersContainer,
        max_skipped: int,
        gather: Callable[[torch.Tensor], torch.Tensor],
    ):
        """Args:
        optimizers: to hold back.
        max_skipped: steps of a run that may be left out.
        gather: gives a tensor's values on all ranks, stacked, without waiting for the device.
        """
        self.optimizers, self.max_skipped, self.gather = optimizers, max_skipped, gather
        self.skipped = 0
        self.on_device = not isinstance(optimizers, OptimizersInBackwardContainer) and all(
            getattr(optimizer, "_step_supports_amp_scaling", False)
            and optimizer.param_groups[0]["params"][0].device.type == device_type  # not offloaded
            for optimizer in optimizers.optimizers
        )
        self._unread: _Numbers | None = None

    def before_step(self, step: str, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """To be called right before each step of the optimizers.

        Args:
            step: how to name it.
            loss: of this rank, a scalar.
            grad_norm: of the whole model, a scalar.

        Raises:
            NonFiniteError: on all ranks, if one step too many is to be left out.
        """
        self.settle()
        of_ranks = self.gather(torch.stack([loss, grad_norm.to(loss)]).float())
        if self.on_device:
            found_inf = (~of_ranks.isfinite().all()).float()
            for optimizer in self.optimizers.optimizers:
                optimizer.found_inf = found_inf
        arrival = None
        if (device := of_ranks.device).type != "cpu":
            of_ranks, arrival = of_ranks.to("cpu", non_blocking=True), device_module.Event()
            arrival.record(device_module.current_stream(device))
        lr = float(self.optimizers.optimizers[0].param_groups[0]["lr"])
        self._unread = _Numbers(step, lr, of_ranks, arrival)
        if not self.on_device and self.settle():
            self.optimizers.zero_grad()  # an optimizer leaves parameters without gradient alone

    def settle(self) -> bool:
        """Read of the last step, if that has not been done; whether it was left out.

        Raises:
            NonFiniteError: on all ranks, if it was one step too many.
        """
        numbers, self._unread = self._unread, None
        if numbers is None or (of_ranks := numbers.read()).isfinite().all():
            return False
        ranks = (~of_ranks[:, 0].isfinite()).nonzero().flatten().tolist()
        what = f"loss not finite on ranks {ranks}" if ranks else "loss finite on all ranks"
        what = f"{numbers.step}: {what}, gradient norm {of_ranks[0, 1]:.6g}"
        if self.skipped < self.max_skipped:
            self.skipped += 1
            logger.warning(
                f"Skipped {what}. {self.skipped} of {self.max_skipped} steps that may be skipped"
            )
            return True
        raise NonFiniteError(
            f"{what}. The optimizer's step was not taken and no checkpoint written. "
            f"{self.skipped} steps were skipped before, resilience.max_skipped_steps = "
            f"{self.max_skipped}. Look at the losses before it in the metrics, the learning rate "
            f"(optimizer.lr, lr_scheduler.warmup_steps; then {numbers.lr:.3g}), "
            "training.mixed_precision_param, and the data of this step"
        )
