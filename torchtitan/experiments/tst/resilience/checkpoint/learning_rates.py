"""Keep the learning rate of the job's own schedule after a resume."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.tools.logging import logger

from ...upstream.names import set_last_rates


@contextmanager
def schedule_of_config(schedulers: LRSchedulersContainer) -> Iterator[None]:
    """Keep the config's learning rates while a checkpoint is loaded in this context.

    The optimizer's state holds the rate that the checkpoint's job would have used next, and
    upstream takes one step with it. That rate is wrong if ``training.steps`` was raised after the
    end, or if ``checkpoint.exclude_from_loading`` names optimizer or scheduler. The scheduler's
    state holds the peak rate, so upstream ignores a changed ``optimizer.lr``.
    """
    # the rates of a user's own kind of scheduler may depend on more than the step
    ours = [scheduler for scheduler in schedulers if isinstance(scheduler, LambdaLR)]
    peaks = [list(scheduler.base_lrs) for scheduler in ours]
    yield
    changed = {
        (now[0], scheduler.base_lrs[0])
        for scheduler, now in zip(ours, peaks, strict=True)
        if scheduler.base_lrs != now
    }
    for now, before in sorted(changed):
        logger.warning(
            f"optimizer.lr = {now}, but {before} in the checkpoint: training continues with the "
            "config's"
        )
    for scheduler, of_config in zip(ours, peaks, strict=True):
        scheduler.base_lrs = of_config
        factors = [function(scheduler.last_epoch) for function in scheduler.lr_lambdas]
        rates = [peak * factor for peak, factor in zip(of_config, factors, strict=True)]
        set_last_rates(scheduler, rates)
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
