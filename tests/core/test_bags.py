import pytest
import torch

from torchtitan.experiments.tst.core import IGNORE_INDEX, document_ids, fold

B, L, S = 2, 5, 3


@pytest.fixture
def batch():
    """Tokens numbered in order: the token after x is x + 1."""
    stream = torch.arange(B * (L * S + 1)).view(B, L * S + 1)
    return stream[:, :-1], stream[:, 1:]


def test_full_predicts_the_next_bag(batch):
    inputs, labels = fold(*batch, S)
    assert inputs.shape == labels.shape == (B, L, S)
    # each bag's targets are the bag after it, and the loader's last label is still a target
    assert torch.equal(labels[:, :-1], inputs[:, 1:])
    assert torch.equal(labels[:, -1, 0], batch[1][:, -1])
    assert (labels[:, -1, 1:] == IGNORE_INDEX).all()


def test_input_predicts_the_next_token(batch):
    inputs, labels = fold(*batch, S, mode="input")
    assert inputs.shape == (B, L, S)
    assert labels.shape == (B, L, 1)
    assert torch.equal(labels[..., 0], inputs[..., -1] + 1)


def test_output_predicts_the_next_tokens(batch):
    inputs, labels = fold(*batch, S, mode="output")
    assert torch.equal(inputs, batch[0])
    assert labels.shape == (B, L * S, S)
    for offset in range(S):
        valid = labels[:, : L * S - offset, offset]
        assert torch.equal(valid, batch[0][:, : L * S - offset] + 1 + offset)
        assert (labels[:, L * S - offset :, offset] == IGNORE_INDEX).all()


@pytest.mark.parametrize("mode", ["full", "input", "output"])
def test_bags_of_one_are_an_ordinary_batch(batch, mode):
    inputs, labels = fold(*batch, 1, mode)
    assert torch.equal(inputs.view(B, L * S), batch[0])
    assert torch.equal(labels.view(B, L * S), batch[1])


@pytest.mark.parametrize("mode", ["full", "input"])
def test_a_length_that_does_not_fold(batch, mode):
    with pytest.raises(ValueError, match="length 15 must be a multiple of the bag size 4"):
        fold(*batch, 4, mode)


def test_unknown_mode(batch):
    with pytest.raises(ValueError, match="'both' is not one of full, input, output"):
        fold(*batch, S, "both")


def test_a_bag_ends_a_document_where_any_of_its_tokens_does():
    eos = 0
    bags = torch.tensor([[[7, 8], [9, eos], [5, 6], [eos, 4], [eos, eos], [3, 2]]])
    assert document_ids(bags, eos).tolist() == [[7, eos, 5, eos, eos, 3]]
    assert document_ids(bags, None).tolist() == [[7, 9, 5, 0, 0, 3]]
