"""The check of loss, gradients and stop requests on all ranks before each optimizer step.

One all-reduce of three numbers tells whether any rank's loss or gradient norm is not finite, and
whether any rank was asked to stop. A fused optimizer skips a step by itself when a number is not
finite (torch's feature for ``GradScaler``). The host does not wait for the device: it reads the
numbers later, at the next step, or before it writes a checkpoint. So all ranks know the same at the
same step. With any other optimizer, the host has to skip the step, and so it waits in each step.
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
    """The numbers of a step, on their way to the host.

    Attributes:
        step: name of the step in messages.
        lr: learning rate of the step.
        values: shape (5,): loss and gradient norm of this rank; then three flags, 1 if on any rank
            the loss was not finite, the norm was not finite, or a stop was requested.
        arrival: event of the copy of ``values`` to the host; None if they are on the host.
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
    """Skips optimizer steps on numbers that are not finite, and spreads a request to stop.

    Attributes:
        skipped: steps of the run skipped so far, as far as :meth:`settle` has read.
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
        """Prepare the check.

        Args:
            optimizers: the optimizers whose steps are skipped.
            max_skipped: maximum number of skipped steps in a run.
            reduce: replaces a tensor by its maximum over all ranks, without waiting for the device.
            share: returns a value of every rank; only called when a step is not finite.
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
        """Check a step; call it right before each step of the optimizers.

        Args:
            step: name of the step in messages.
            loss: loss of this rank, a scalar.
            grad_norm: gradient norm of the whole model, a scalar.
            stop: whether this rank was asked to stop.

        Raises:
            NonFiniteError: on all ranks, if more steps than allowed would be skipped.
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
            self.optimizers.zero_grad()  # optimizers do not change parameters without gradients

    def settle(self) -> bool:
        """Read the numbers of the last step if they are unread. Return whether it was skipped.

        Raises:
            NonFiniteError: on all ranks, if more steps than allowed would be skipped.
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
                f"Skipped {what}. Skipped so far: {self.skipped} of at most {self.max_skipped} "
                "steps (resilience.max_skipped_steps)"
            )
            return True
        raise NonFiniteError(
            f"{what}. The optimizer's step was not taken, and no checkpoint was written. "
            f"{self.skipped} steps were skipped before; resilience.max_skipped_steps = "
            f"{self.max_skipped} allows no more. Check the losses of earlier steps in the metrics, "
            f"the learning rate ({numbers.lr:.3g} in this step; optimizer.lr, "
            "lr_scheduler.warmup_steps), training.mixed_precision_param, and the data of this step"
        )
