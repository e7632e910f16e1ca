import pytest
import torch

from torchtitan.experiments.tst.core import ExpertLoad, load_balancing_loss
from torchtitan.experiments.tst.core.load_balance import router_probabilities

E, K, TOKENS, WIDTH, COEFFICIENT = 8, 2, 64, 16, 0.3


def route(weight, inputs, function):
    logits = inputs @ weight.T
    scores, chosen = router_probabilities(logits, function).topk(K)
    return logits, scores, torch.bincount(chosen.flatten(), minlength=E)


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_gradient_is_that_of_the_loss_over_the_micro_batches_so_far(function):
    torch.manual_seed(0)
    weight = torch.randn(E, WIDTH, requires_grad=True)
    parts = torch.randn(3, TOKENS, WIDTH).unbind()
    load = ExpertLoad(5, E, COEFFICIENT)
    load.begin_step(len(parts) * TOKENS)
    counts, expected = torch.zeros(E), torch.zeros(E, WIDTH)
    for part in parts:
        logits, scores, chosen = route(weight, part, function)
        load.count(3, chosen)
        load.with_auxiliary_loss(3, scores, logits, function).sum().backward()
        counts += chosen
        logits, scores, _ = route(weight, part, function)
        probabilities = router_probabilities(logits, function).sum(0)
        of_part = E * (counts / counts.sum() * probabilities).sum() / (len(parts) * TOKENS)
        (gradient,) = torch.autograd.grad(scores.sum() + COEFFICIENT * of_part, weight)
        expected += gradient
    torch.testing.assert_close(weight.grad, expected)
    all_counts, sums = load.totals()
    assert all_counts[3].tolist() == counts.tolist()
    assert all_counts[[0, 1, 2, 4]].sum() == 0
    assert sums[3].sum() == pytest.approx(3 * TOKENS)


def test_counts_of_all_ranks_are_added_up_once_a_micro_batch():
    added = []
    load = ExpertLoad(2, E, COEFFICIENT, lambda counts: added.append(counts.add_(1)))
    load.begin_step(2 * TOKENS)
    for _ in range(2):
        weight = torch.randn(E, WIDTH, requires_grad=True)
        outputs = []
        for layer in range(2):
            logits, scores, chosen = route(weight, torch.randn(TOKENS, WIDTH), "softmax")
            load.count(layer, chosen)
            outputs.append(load.with_auxiliary_loss(layer, scores, logits, "softmax").sum())
        sum(outputs).backward()
    assert len(added) == 2
    assert load.totals()[0].sum() == 2 * 2 * TOKENS * K  # of this rank alone


def test_loss_of_even_and_of_one_expert():
    even, one = torch.full((E,), 3.0), torch.eye(E)[0]
    losses = load_balancing_loss(torch.stack([even, one]), torch.stack([even, one]))
    assert losses.tolist() == [1, E]


def test_counts_beyond_float32():
    load = ExpertLoad(1, E)
    load.begin_step(2**40)
    for _ in range(2):
        load.count(0, torch.full((E,), 2**40 + 1))
    assert load.totals()[0].tolist() == [[2 * (2**40 + 1)] * E]
