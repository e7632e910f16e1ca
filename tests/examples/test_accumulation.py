"""The example of accumulation: micro-batches and ranks are one large batch."""

import pytest
import torch
from loading import load_example
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchtitan.experiments.tst.core import IGNORE_INDEX, BagEmbedding, BagLoss

example = load_example("accumulation")
V, L = 32, 8


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(BagEmbedding(V, 16), nn.Tanh(), nn.Linear(16, V))


def micro_batches(bag_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four batches of one sequence. The later ones have ever fewer valid targets."""
    torch.manual_seed(1)
    bags, targets = torch.randint(V, (2, 4, 1, L, bag_size))
    share = torch.tensor([0.0, 0.3, 0.6, 0.9])[:, None, None, None]
    targets[torch.rand(targets.shape) < share] = IGNORE_INDEX
    return list(zip(bags, targets, strict=True))


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def of_one_batch(bag_size: int, bag_loss: BagLoss) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of the mean over all targets."""
    model = new_model()
    bags, targets = map(torch.cat, zip(*micro_batches(bag_size), strict=True))
    loss = bag_loss(model(bags), targets)
    loss.backward()
    return loss.detach(), gradients_of(model)


def assert_one_batch(loss, gradients, bag_size: int, bag_loss: BagLoss) -> None:
    expected = of_one_batch(bag_size, bag_loss)
    torch.testing.assert_close((loss, gradients), expected, rtol=1e-6, atol=1e-6)


LOSSES = [BagLoss(), BagLoss(weighting="power_law"), BagLoss("bce")]


@pytest.mark.parametrize("bag_loss", LOSSES, ids=str)
@pytest.mark.parametrize("bag_size", [4, 1])
def test_micro_batches_are_one_batch(bag_size, bag_loss):
    model = new_model()
    loss = example.backward(model, micro_batches(bag_size), bag_loss)
    assert not loss.requires_grad
    assert_one_batch(loss, gradients_of(model), bag_size, bag_loss)


def test_the_mean_of_means_is_another_loss():
    means = [BagLoss()(new_model()(bags), targets) for bags, targets in micro_batches(4)]
    assert (torch.stack(means).mean() - of_one_batch(4, BagLoss())[0]).abs() > 1e-3


def test_recovery_is_the_ordinary_mean():
    tokens, targets = map(torch.cat, zip(*micro_batches(1), strict=True))
    expected = nn.functional.cross_entropy(
        new_model()(tokens[..., 0]).flatten(0, 1), targets.flatten()
    )
    loss = example.backward(new_model(), micro_batches(1), BagLoss())
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-6)


def run_on_rank() -> None:
    rank, model = torch.distributed.get_rank(), DistributedDataParallel(new_model())
    mine = micro_batches(4)[2 * rank : 2 * rank + 2]
    loss = example.backward(model, mine, BagLoss())
    assert_one_batch(loss, gradients_of(model), 4, BagLoss())


def test_two_ranks_are_one_batch(on_ranks):
    on_ranks(2, run_on_rank)
