import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from test_embedding import CHANGES
from test_losses import listing, relative_error
from torch import nn

from torchtitan.experiments.tst.core import IGNORE_INDEX, BagLoss, LossHead, offset_weights

WIDTH, VOCABULARY = 16, 90


def batch(bag_size):
    torch.manual_seed(0)
    hidden = torch.randn(2, 21, WIDTH, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (2, 21, bag_size))
    labels[torch.rand(labels.shape) < 0.2] = IGNORE_INDEX
    return hidden, labels


def head_and_loss(dtype, labels, chunks, weighting="uniform", compiled=False):
    torch.manual_seed(1)
    linear = nn.Linear(WIDTH, VOCABULARY, bias=False).to(dtype)
    head = LossHead.from_linear(linear, chunks)
    exact = copy.deepcopy(linear).double()
    bag_loss = BagLoss("mce", weighting, overwrite_logits=True)
    torch.compiler.reset()  # or compilations of other tests count to a limit
    coefficients = bag_loss.coefficients(bag_loss.counts(labels))
    summed = torch.compile(bag_loss.sum, backend="aot_eager") if compiled else bag_loss.sum

    def loss_fn(z, y):
        return summed(z, y, coefficients)

    return exact, head, loss_fn


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("chunks", [1, 4, 100])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_chunks_are_the_papers_listing_in_float64(dtype, tolerance, chunks, compiled):
    exact_hidden, labels = batch(bag_size=5)
    linear, head, loss_fn = head_and_loss(dtype, labels, chunks, "power_law", compiled)
    exact_hidden = exact_hidden.to(dtype).double().requires_grad_()
    expected = 3 * listing(linear(exact_hidden), labels, offset_weights("power_law", 5))
    expected.backward()

    hidden = exact_hidden.detach().to(dtype).requires_grad_()
    head.expect(labels, loss_fn)
    loss = 3 * head(hidden)
    loss.backward()
    assert relative_error(loss, expected) < tolerance
    assert relative_error(hidden.grad, exact_hidden.grad) < tolerance
    assert relative_error(head.weight.grad, linear.weight.grad) < tolerance


def test_an_ordinary_loss_in_chunks():
    hidden, labels = batch(bag_size=1)
    labels = labels[..., 0]
    linear, head, _ = head_and_loss(torch.float64, labels[..., None], chunks=3)

    def loss_fn(z, y):
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum")

    expected = loss_fn(linear(hidden), labels)
    head.expect(labels, loss_fn)
    torch.testing.assert_close(head(hidden), expected)


def test_labels_are_for_one_forward():
    hidden, labels = batch(bag_size=5)
    linear, head, loss_fn = head_and_loss(torch.float64, labels, chunks=3)
    head.expect(labels, loss_fn)
    with torch.no_grad():
        loss = head(hidden)
    torch.testing.assert_close(loss, loss_fn(linear(hidden), labels))
    assert torch.equal(head(hidden), linear(hidden))


def test_logits_of_one_chunk_at_a_time():
    hidden, labels = batch(bag_size=5)
    _, head, whole = head_and_loss(torch.float64, labels, chunks=4)
    shapes, memory = [], []

    def loss_fn(z, y):
        assert all(logits() is None for logits in memory)
        memory.append(weakref.ref(z._base))
        shapes.append((*z.shape, *y.shape))
        return whole(z, y)

    head.expect(labels, loss_fn)
    head(hidden.requires_grad_()).backward()
    assert shapes == [(1, n, VOCABULARY, 1, n, 5) for n in (11, 11, 11, 9)]


def test_weight_is_shared_and_names_are_upstreams():
    linear = nn.Linear(4, 6, bias=False)
    head = LossHead.from_linear(linear, chunks=2)
    assert head.weight is linear.weight
    assert list(head.state_dict()) == ["weight"]
    with pytest.raises(ValueError, match="bias"):
        LossHead.from_linear(nn.Linear(4, 6), chunks=2)


@pytest.mark.parametrize(("change", "what"), CHANGES)
def test_a_head_that_does_more_has_no_chunks(change, what):
    with pytest.raises(ValueError, match=rf"^\w+ has {what}: no chunks of it"):
        LossHead.from_linear(change(nn.Linear(4, 6, bias=False)), chunks=2)
    LossHead.from_linear(LossHead(4, 6, bias=False), chunks=2)
