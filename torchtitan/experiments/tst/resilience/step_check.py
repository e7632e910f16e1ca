"""What the ranks tell each other before each optimizer step, without a wait for the device.

One all-reduce of three numbers says whether any rank's loss or gradient norm is not finite, and
whether any rank was asked to stop. A fused optimizer leaves a step out by itself where a number is
not finite (what torch made for ``GradScaler``). The host reads the numbers later, when the device
has moved on: at the next step, or before it would write a checkpoint. So all ranks know the same at
the same step. Any other optimizer has to be held back by the host, which then waits for each step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.optimizer import OptimizersContainer, OptimizersInBackwardContainer
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_module, device_type

from ..errors import UserError


class NonFiniteError(UserError, RuntimeError):
    """A loss or gradient norm that is not finite; the optimizer's step was not taken."""


@dataclass(frozen=True)
class _Numbers:
    """Numbers of a step, on their way to the host.

    Attributes:
        step: as messages name it.
        lr: its learning rate.
        values: loss and gradient norm of this rank; then 1 or 0 for whether on any rank the loss
            was not finite, the norm was not finite, and a stop was asked for. (5,)
        arrival: of ``values``; None if they are there.
    """

    step: str
    lr: float
    values: torch.Tensor
    arrival: torch.Event | None

    def read(self) -> list[float]:
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.values.tolist()


class StepCheck:
    """Leaves out optimizer steps on numbers that are not finite, and spreads a request to stop.

    Attributes:
        skipped: steps of the run left out so far, as far as :meth:`settle` has read.
        stop: whether any rank was asked to stop, as far as :meth:`settle` has read; the same on
            all ranks.
    """

    def __init__(
        self,
        optimizers: OptimizersContainer,
        max_skipped: int,
        reduce: Callable[[torch.Tensor], object],
        share: Callable[[Any], list[Any]],
    ):
        """Args:
        optimizers: to hold back.
        max_skipped: steps of a run that may be left out.
        reduce: replaces a tensor by its maximum over all ranks, without waiting for the device.
        share: gives a value of every rank; only called when a step is not finite.
        """
        self.optimizers, self.max_skipped = optimizers, max_skipped
        self.reduce, self.share = reduce, share
        self.skipped, self.stop = 0, False
        self.on_device = not isinstance(optimizers, OptimizersInBackwardContainer) and all(
            getattr(optimizer, "_step_supports_amp_scaling", False)
            and optimizer.param_groups[0]["params"][0].device.type == device_type  # not offloaded
            for optimizer in optimizers.optimizers
        )
        self._unread: _Numbers | None = None

    def before_step(
        self, step: str, loss: torch.Tensor, grad_norm: torch.Tensor, stop: bool
    ) -> None:
        """To be called right before each step of the optimizers.

        Args:
            step: how to name it.
            loss: of this rank, a scalar.
            grad_norm: of the whole model, a scalar.
            stop: whether this rank was asked to stop.

        Raises:
            NonFiniteError: on all ranks, if one step too many is to be left out.
        """
        self.settle()
        own = torch.stack([loss, grad_norm.to(loss)]).float()
        asked = torch.full((1,), float(stop), device=own.device)  # a fill, not a copy from the host
        flags = torch.cat([(~own.isfinite()).float(), asked])
        self.reduce(flags)
        if self.on_device:
            found_inf = flags[:2].amax()
            for optimizer in self.optimizers.optimizers:
                optimizer.found_inf = found_inf
        values, arrival = torch.cat([own, flags]), None
        if (device := values.device).type != "cpu":
            values, arrival = values.to("cpu", non_blocking=True), device_module.Event()
            arrival.record(device_module.current_stream(device))
        lr = float(self.optimizers.optimizers[0].param_groups[0]["lr"])
        self._unread = _Numbers(step, lr, values, arrival)
        if not self.on_device and self.settle():
            self.optimizers.zero_grad()  # an optimizer leaves parameters without gradient alone

    def settle(self) -> bool:
        """Read the numbers of the last step if they are unread. Return whether it was skipped.

        Raises:
            NonFiniteError: on all ranks, if it was one step too many.
        """
        numbers, self._unread = self._unread, None
        if numbers is None:
            return False
        loss, grad_norm, bad_loss, bad_norm, stop = numbers.read()
        self.stop |= bool(stop)
        if not (bad_loss or bad_norm):
            return False
        finite = self.share(math.isfinite(loss))
        ranks = [rank for rank, is_finite in enumerate(finite) if not is_finite]
        what = f"loss not finite on ranks {ranks}" if ranks else "loss finite on all ranks"
        what = f"{numbers.step}: {what}, gradient norm {grad_norm:.6g}"
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
