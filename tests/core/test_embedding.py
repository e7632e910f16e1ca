import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from torchtitan.experiments.tst.core import BagEmbedding


@pytest.fixture
def ordinary():
    torch.manual_seed(0)
    return nn.Embedding(50, 8)


def test_ordinary_ids_are_embedded_as_ever(ordinary):
    ids = torch.randint(50, (2, 5))
    assert torch.equal(BagEmbedding.from_embedding(ordinary)(ids), ordinary(ids))


@pytest.mark.parametrize("padding_idx", [None, 7])
def test_a_bag_is_the_mean_of_its_tokens_forward_and_backward(padding_idx):
    ordinary = nn.Embedding(50, 8, padding_idx)
    ids = torch.randint(50, (2, 5, 3))
    embedding = BagEmbedding.from_embedding(ordinary)
    upstream = torch.randn(2, 5, 8)

    bags = embedding(ids)
    (grad,) = torch.autograd.grad(bags, embedding.weight, upstream)

    reference = sum(ordinary(ids[..., i]) for i in range(3)) / 3
    (reference_grad,) = torch.autograd.grad(reference, ordinary.weight, upstream)
    torch.testing.assert_close(bags, reference)
    torch.testing.assert_close(grad, reference_grad)


def test_the_mean_is_taken_in_float32(ordinary):
    ids = torch.randint(50, (4, 16, 16))
    ordinary.to(torch.bfloat16)
    bags = BagEmbedding.from_embedding(ordinary)(ids)
    assert bags.dtype == torch.bfloat16
    exact = ordinary(ids).double().mean(-2)
    rounded, added_in_bfloat16 = exact.to(torch.bfloat16), sum(ordinary(ids).unbind(-2)) / 16
    error = (bags - exact).norm()
    assert error < 1.1 * (rounded - exact).norm()
    assert error < 0.5 * (added_in_bfloat16 - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bags_are_not_a_view(ordinary, dtype):
    """FSDP2 warns of a module that gives one."""
    embedding = BagEmbedding.from_embedding(ordinary.to(dtype))
    assert embedding(torch.randint(50, (2, 5, 3)))._base is None


def test_weight_and_state_dict_are_the_embeddings_own(ordinary):
    embedding = BagEmbedding.from_embedding(ordinary)
    assert embedding.weight is ordinary.weight
    assert list(embedding.state_dict()) == list(ordinary.state_dict())


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 8 * super().forward(ids)


def with_forward_of_the_instance(module):
    module.forward = lambda x: 8 * type(module).forward(module, x)
    return module


def with_hook(module):
    module.register_forward_hook(lambda module, args, output: 8 * output)
    return module


def with_hook_before(module):
    module.register_forward_pre_hook(lambda module, args: args)
    return module


CHANGES = [
    (with_forward_of_the_instance, "a forward of its own"),
    (with_hook, "a forward hook"),
    (with_hook_before, "a forward hook"),
    (weight_norm, "a parametrization"),
]


@pytest.mark.parametrize(("change", "what"), [*CHANGES, (lambda _: Scaled(50, 8), "a forward of")])
def test_what_would_be_lost_is_refused(ordinary, change, what):
    with pytest.raises(ValueError, match=rf"^\w+ has {what}.*, which bags would not use"):
        BagEmbedding.from_embedding(change(ordinary))


def test_a_bag_embedding_can_be_wrapped_again():
    BagEmbedding.from_embedding(BagEmbedding(50, 8))
