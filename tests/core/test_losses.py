import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from torchtitan.experiments.tst.core import (
    IGNORE_INDEX,
    LOSSES,
    WEIGHTINGS,
    BagLoss,
    fold,
    losses,
    offset_weights,
)


def listing(logits, labels, weights):
    """Appendix A as described: one cross-entropy for each offset, the weighted mean of them."""
    ces = [
        w * F.cross_entropy(logits.flatten(0, 1), labels[..., i].flatten(), ignore_index=-100)
        for i, w in enumerate(weights.tolist())
    ]
    return sum(ces) / weights.sum()


def random_batch(seed, dtype=torch.float32, ignored=0.2):
    g = torch.Generator().manual_seed(seed)
    b, latents, s, v = (
        int(torch.randint(lo, hi, (), generator=g))
        for lo, hi in [(1, 4), (8, 20), (1, 9), (3, 200)]
    )
    logits = 4 * torch.randn(b, latents, v, generator=g, dtype=dtype)
    labels = torch.randint(v, (b, latents, s), generator=g)
    labels[torch.rand(b, latents, s, generator=g) < ignored] = IGNORE_INDEX
    labels[0, 0] = 0  # a bag of equal tokens; no offset is without a valid target
    return logits.requires_grad_(), labels


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("seed", range(10))
def test_mce_is_the_papers_listing_forward_and_backward(seed, weighting):
    logits, labels = random_batch(seed)
    loss = BagLoss("mce", weighting)(logits, labels)
    (grad,) = torch.autograd.grad(loss, logits)

    exact = logits.detach().double().requires_grad_()
    expected = listing(exact, labels, offset_weights(weighting, labels.shape[-1]))
    (expected_grad,) = torch.autograd.grad(expected, exact)
    assert relative_error(loss, expected) < 1e-6
    assert relative_error(grad, expected_grad) < 1e-6


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_mce_of_a_folded_batch_is_the_papers_listing(weighting):
    """The tail of a folded sequence has fewer targets at the later offsets."""
    stream = torch.randint(50, (2, 13))
    _, labels = fold(stream[:, :-1], stream[:, 1:], 4)
    logits = torch.randn(2, 3, 50)
    expected = listing(logits, labels, offset_weights(weighting, 4))
    torch.testing.assert_close(BagLoss("mce", weighting)(logits, labels), expected.float())


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss):
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 3, 7, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor(
        [[[1, 1, 2], [-100, 3, 4], [-100] * 3], [[0, 6, 5], [2, 2, 2], [1, 0, -100]]]
    )
    assert torch.autograd.gradcheck(lambda z: BagLoss(loss)(z, labels), logits)


@pytest.mark.parametrize(("loss", "parts"), itertools.product(LOSSES, [2, 5]))
def test_parts_add_up_to_the_mean_over_all(loss, parts):
    """Micro-batches and ranks with unequal numbers of ignored labels."""
    torch.manual_seed(0)
    logits = torch.randn(10, 6, 30)
    labels = torch.randint(30, (10, 6, 4))
    labels[:3, :, 1:] = IGNORE_INDEX
    labels[7, 2] = IGNORE_INDEX
    bag_loss = BagLoss(loss, "power_law" if loss == "mce" else "uniform")

    split = list(zip(logits.chunk(parts), labels.chunk(parts), strict=True))
    coefficients = bag_loss.coefficients(sum(bag_loss.counts(y) for _, y in split))
    total = sum(bag_loss.sum(z, y, coefficients) for z, y in split)
    torch.testing.assert_close(total, bag_loss(logits, labels))


def bag_sets(labels):
    """Row and set of distinct valid tokens of each bag that has any."""
    for row, bag in enumerate(labels.flatten(0, 1).tolist()):
        if members := set(bag) - {IGNORE_INDEX}:
            yield row, sorted(members)


def naive_mce_alt(z, members):
    return -math.log(sum(z.softmax(-1)[v].item() for v in members))


def naive_bce(z, members):
    target = torch.zeros_like(z)
    target[members] = 1
    return F.binary_cross_entropy_with_logits(z, target, reduction="sum").item()


def naive_hinge(z, members):
    return sum(max(0.0, 1 - (1 if v in members else -1) * z[v].item()) for v in range(len(z)))


@pytest.mark.parametrize(
    ("loss", "naive"),
    [("mce_alt", naive_mce_alt), ("bce", naive_bce), ("hinge", naive_hinge)],
)
@pytest.mark.parametrize("seed", range(3))
def test_variants_against_their_definition(loss, naive, seed):
    logits, labels = random_batch(seed, ignored=0.6)
    z = logits.detach().flatten(0, 1).double()
    expected = [naive(z[row], members) for row, members in bag_sets(labels)]
    mean = sum(expected) / len(expected)
    assert BagLoss(loss)(logits, labels).item() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("uniform", [1, 1, 1]),
        ("power_law", [1, 1 / 2, 1 / 3]),
        ("exponential", [math.exp(-1), math.exp(-2), math.exp(-3)]),
        ("first_token", [1, 0, 0]),
        ("fitted", [4.98, 3.63 + 1.35 * 2**-1.25, 3.63 + 1.35 * 3**-1.25]),
    ],
)
def test_weightings(weighting, expected):
    assert offset_weights(weighting, 3).tolist() == pytest.approx(expected)


def test_first_token_only_is_an_ordinary_cross_entropy():
    logits, labels = random_batch(0)
    expected = F.cross_entropy(logits.flatten(0, 1), labels[..., 0].flatten())
    torch.testing.assert_close(BagLoss("mce", "first_token")(logits, labels), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_logits_are_computed_in_float32(loss):
    logits, labels = random_batch(1)
    half = logits.detach().bfloat16().requires_grad_()
    assert torch.equal(BagLoss(loss)(half, labels), BagLoss(loss)(half.float(), labels))
    (grad,) = torch.autograd.grad(BagLoss(loss)(half, labels), half)
    assert grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_mce_in_blocks(monkeypatch, dtype, tolerance, overwrite):
    """Some rows at a time, the last block smaller, also with the gradient in the logits' memory."""
    monkeypatch.setattr(losses, "_BLOCK_OF_CPU", 7 * 50)
    logits = (4 * torch.randn(2, 12, 50)).to(dtype)
    labels = torch.randint(50, (2, 12, 6))
    labels[:, -1, 1:] = IGNORE_INDEX
    exact = logits.double().requires_grad_()
    expected = listing(exact, labels, offset_weights("fitted", 6))
    (expected_grad,) = torch.autograd.grad(expected, exact)

    logits.requires_grad_()
    computed = logits.clone()  # as by an LM head
    memory = computed.data_ptr()
    computed.register_hook(lambda grad: overwritten.append(grad.data_ptr() == memory))
    overwritten = []
    loss = BagLoss("mce", "fitted", overwrite)(computed, labels)
    loss.backward()
    assert overwritten == [overwrite]
    assert relative_error(loss, expected) < tolerance
    assert relative_error(logits.grad, expected_grad) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_gradient_is_the_same_in_one_pass_as_in_a_cache(dtype, tolerance):
    """That of an accelerator, and that of the CPU."""
    torch.manual_seed(0)
    labels = torch.randint(50, (12, 6))
    labels[:, 1] = labels[:, 0]
    arguments = (torch.randn(12, 1), labels, torch.rand(12, 6))
    probabilities = torch.rand(12, 50).softmax(-1)
    one_pass, in_cache = torch.empty(2, 12, 50, dtype=dtype)
    losses._write_in_one_pass(probabilities.clone(), one_pass, *arguments)
    losses._write_in_cache(probabilities.clone(), in_cache, *arguments)
    assert relative_error(one_pass, in_cache) < tolerance


def test_blocks_share_their_memory(monkeypatch):
    """On a CPU; else the system may clear new memory for each of them."""
    monkeypatch.setattr(losses, "_BLOCK_OF_CPU", 20)
    logits, shift = torch.randn(12, 10, dtype=torch.bfloat16), torch.randn(12, 1)
    exact = logits.double()
    for blocks, expected in (
        (losses._softmax_blocks(torch.softmax, torch.float32, logits), exact.softmax(-1)),
        (losses._exp_blocks(logits, shift), (exact - shift).exp()),
    ):
        places, values = zip(*((block, block.clone()) for (block,) in blocks), strict=True)
        assert len(places) == 6
        assert len({block.data_ptr() for block in places}) == 1
        assert relative_error(torch.cat(values), expected) < 1e-6


def test_overwritten_logits_cannot_be_used_again():
    logits, labels = random_batch(0)
    computed = logits.clone()
    loss = BagLoss("mce", overwrite_logits=True)(computed, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_valid_target_at_all(loss):
    logits = torch.randn(1, 2, 5, requires_grad=True)
    value = BagLoss(loss)(logits, torch.full((1, 2, 3), IGNORE_INDEX))
    (grad,) = torch.autograd.grad(value, logits)
    assert value == 0
    assert not grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_compiled_is_eager(loss):
    logits, labels = random_batch(2)
    bag_loss = BagLoss(loss)
    coefficients = bag_loss.coefficients(bag_loss.counts(labels))
    torch.compiler.reset()  # or compilations of other tests count to a limit
    compiled = torch.compile(bag_loss.sum, backend="aot_eager", fullgraph=True)
    eager = bag_loss.sum(logits, labels, coefficients)
    torch.testing.assert_close(compiled(logits, labels, coefficients), eager)
    for a, b in zip(
        torch.autograd.grad(compiled(logits, labels, coefficients), logits),
        torch.autograd.grad(eager, logits),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
