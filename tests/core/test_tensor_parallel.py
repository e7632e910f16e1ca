"""Embedding, loss and head with the vocabulary sharded over two ranks: the same numbers as on one,
and the communication of single tokens."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from torchtitan.experiments.tst.core import (
    IGNORE_INDEX,
    LOSSES,
    WEIGHTINGS,
    BagEmbedding,
    BagLoss,
    LossHead,
)
from torchtitan.experiments.tst.core.vocabulary import VocabularyShard

RANKS = 2
BATCH, LATENTS, BAG, WIDTH = 2, 6, 4, 8
VOCABULARY = 91  # not the same on both ranks


def check_embedding(dtype, placement):
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    whole = BagEmbedding(VOCABULARY, WIDTH, dtype=dtype)
    bags = torch.randint(VOCABULARY, (BATCH, LATENTS, BAG))
    upstream = torch.randn(BATCH, LATENTS, WIDTH, dtype=dtype)
    sharded = copy.deepcopy(whole)
    style = RowwiseParallel(input_layouts=Replicate(), output_layouts=placement)
    parallelize_module(sharded, mesh, style)

    expected = whole(bags)
    expected.backward(upstream)
    output = sharded(bags)
    whole_output = DTensor.from_local(output, mesh, [placement]).full_tensor()
    whole_output.backward(upstream)
    # in bfloat16 each rank rounds its part, as what is communicated has it
    tolerance = {torch.float32: {}, torch.bfloat16: {"rtol": 0.02, "atol": 0.01}}[dtype]
    torch.testing.assert_close(whole_output, expected, **tolerance)
    torch.testing.assert_close(sharded.weight.grad.full_tensor(), whole.weight.grad)


def check_spread():
    """Ids of the other rank fall on all entries alike, and count for nothing."""
    mesh = init_device_mesh("cpu", (RANKS,))
    embedding = BagEmbedding(VOCABULARY, WIDTH)
    parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()))
    shard = VocabularyShard.of(embedding.weight, 0)
    ids = torch.arange(VOCABULARY)
    index, here = shard.find(ids)
    assert torch.equal(index[here] + shard.offset, ids[here])
    assert here.sum() == shard.entries
    assert index.bincount().max() <= 3  # its own, and one or two others


def check_losses(compiled):
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    z = 4 * torch.randn(BATCH, LATENTS, VOCABULARY, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (BATCH, LATENTS, BAG))
    labels[torch.rand(labels.shape) < 0.3] = IGNORE_INDEX
    labels[0, 0], labels[0, 1] = IGNORE_INDEX, VOCABULARY - 1
    variants = [BagLoss("mce", weighting) for weighting in WEIGHTINGS]
    for bag_loss in (*variants, *map(BagLoss, LOSSES), BagLoss("mce", overwrite_logits=True)):
        coefficients = 3 * bag_loss.coefficients(bag_loss.counts(labels))
        whole = z.clone().requires_grad_()
        expected = bag_loss.sum(whole, labels, coefficients)
        expected.backward()
        part = z.chunk(RANKS, dim=-1)[dist.get_rank()].clone().requires_grad_()
        shape = (z.shape, z.stride())
        logits = DTensor.from_local(part, mesh, [Shard(-1)], shape=shape[0], stride=shape[1])
        summed = torch.compile(bag_loss.sum, backend="aot_eager") if compiled else bag_loss.sum
        loss = summed(logits, labels, coefficients)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        part_of_grad = whole.grad.chunk(RANKS, dim=-1)[dist.get_rank()]
        torch.testing.assert_close(part.grad, part_of_grad)


def check_head(bag_size, with_loss_parallel):
    """In chunks against whole, as upstream parallelizes the LM head."""
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, 96, bias=False, dtype=torch.float64)
    hidden = torch.randn(BATCH, LATENTS, WIDTH, dtype=torch.float64)
    labels = torch.randint(96, (BATCH, LATENTS, bag_size)).squeeze(-1)
    labels[0, 1] = IGNORE_INDEX
    coefficients = torch.rand(bag_size, dtype=torch.float64)

    def loss_fn(z, y):
        if y.ndim == 3:
            return BagLoss().sum(z, y, coefficients)
        if isinstance(z, DTensor) and not with_loss_parallel:
            z = z.full_tensor()
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum")

    whole = hidden.clone().requires_grad_()
    expected = loss_fn(linear(whole), labels)
    expected.backward()

    head = LossHead.from_linear(copy.deepcopy(linear), chunks=5)
    style = ColwiseParallel(
        input_layouts=Shard(1),
        output_layouts=Shard(-1) if with_loss_parallel else Replicate(),
        use_local_output=not with_loss_parallel,
    )
    parallelize_module(head, mesh, style)
    head.expect(labels, loss_fn)
    part = hidden.chunk(RANKS, dim=1)[dist.get_rank()].clone().requires_grad_()
    with loss_parallel() if with_loss_parallel else contextlib.nullcontext():
        loss = head(part)
        loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
        loss.squeeze().backward()
    torch.testing.assert_close(loss.squeeze(), expected)
    torch.testing.assert_close(head.weight.grad.full_tensor(), linear.weight.grad)
    torch.testing.assert_close(part.grad, whole.grad.chunk(RANKS, dim=1)[dist.get_rank()])


class Communication(CommDebugMode):
    """Counts the bytes that a rank hands to collectives, too."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.get_total_counts()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.get_total_counts() > before:
            self.bytes += args[0].nbytes
        return result


def communication(work):
    with Communication() as mode:
        work()
    return mode.bytes, mode.get_total_counts(), dict(mode.get_comm_counts())


def check_communication():
    mesh = init_device_mesh("cpu", (RANKS,))
    tokens = torch.randint(VOCABULARY, (BATCH, LATENTS))
    bags = torch.randint(VOCABULARY, (BATCH, LATENTS, BAG))
    embedding = BagEmbedding(VOCABULARY, WIDTH)
    style = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    parallelize_module(embedding, mesh, style)
    of_tokens = communication(lambda: embedding(tokens).sum().backward())
    embedding.weight.grad = None
    of_bags = communication(lambda: embedding(bags).sum().backward())
    print("embedding: bytes, collectives of single tokens, of bags:", of_tokens, of_bags)
    assert of_bags == of_tokens
    assert of_bags[0] > 4 * BATCH * LATENTS * WIDTH

    z = torch.randn(BATCH * LATENTS, VOCABULARY)
    part = z.chunk(RANKS, dim=-1)[dist.get_rank()].clone().requires_grad_()
    logits = DTensor.from_local(part, mesh, [Shard(-1)], shape=z.shape, stride=z.stride())
    with loss_parallel():
        of_one = communication(
            lambda: F.cross_entropy(logits, tokens.flatten(), reduction="sum").backward()
        )
    of_bag = communication(
        lambda: BagLoss().sum(logits, bags.flatten(0, 1), torch.ones(BAG)).backward()
    )
    print("loss: bytes, collectives of single tokens, of bags:", of_one, of_bag)
    assert of_bag[0] == of_one[0] == 3 * 4 * BATCH * LATENTS  # three float32 for each position
    assert of_bag[1] <= of_one[1]


@pytest.mark.parametrize("placement", [Replicate(), Shard(1)], ids=["plain", "sequence parallel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(on_ranks, dtype, placement):
    on_ranks(RANKS, check_embedding, dtype, placement)


def test_ids_of_other_ranks_are_spread(on_ranks):
    on_ranks(RANKS, check_spread)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_losses(on_ranks, compiled):
    on_ranks(RANKS, check_losses, compiled)


@pytest.mark.parametrize("bag_size", [1, 3], ids=["ordinary", "bags"])
@pytest.mark.parametrize("with_loss_parallel", [True, False], ids=["loss parallel", "gathered"])
def test_head_in_chunks(on_ranks, bag_size, with_loss_parallel):
    on_ranks(RANKS, check_head, bag_size, with_loss_parallel)


def test_communication_is_that_of_single_tokens(on_ranks):
    on_ranks(RANKS, check_communication)
