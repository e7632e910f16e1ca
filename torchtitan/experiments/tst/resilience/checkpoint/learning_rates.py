"""The learning rate after a resume: that of the job's own schedule."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.tools.logging import logger

from ...upstream.names import set_last_rates


@contextmanager
def schedule_of_config(schedulers: LRSchedulersContainer) -> Iterator[None]:
    """Keep to the config's learning rates while a checkpoint is loaded.

    The optimizer's state has the rate that the checkpoint's job would have used next, and upstream
    takes one step with it. It is another one where ``training.steps`` was raised after the end, and
    where ``checkpoint.exclude_from_loading`` names optimizer or scheduler. The peak rate is in the
    scheduler's state, so that upstream ignores a changed ``optimizer.lr``.
    """
    # another scheduler, of a user's train spec, may have a rate that depends on more than the step
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
            f"optimizer.lr = {now}, in the checkpoint {before}: training goes on with the config's"
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
