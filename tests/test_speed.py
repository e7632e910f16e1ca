"""What the bag loss costs beside one cross-entropy; ``scripts/benchmark/loss.py`` at full size."""

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT

POSITIONS, VOCABULARY, WIDTH, BAG_SIZE = 256, 32_000, 16, 16


@pytest.fixture(scope="module")
def suite():
    """The modules of the benchmark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts" / "benchmark")
        import loss
        import measuring

        yield loss, measuring


@pytest.fixture(scope="module")
def labels():
    return torch.randint(VOCABULARY, (1, POSITIONS, BAG_SIZE))


def test_time_and_memory_of_the_loss(suite, labels):
    loss, _ = suite
    logits = torch.randn(1, POSITIONS, VOCABULARY, dtype=torch.bfloat16)
    results = loss.loss_alone(logits, labels, rounds=5, compiled=False)
    ordinary, bag = results[loss.ORDINARY], results[loss.BAG]
    assert bag.ratio(ordinary) < 1.25
    assert bag.peak_bytes < ordinary.peak_bytes / 4
    assert results[loss.PAPER].ratio(bag) > 4


@pytest.mark.parametrize("name", ["cross-entropy", "bag loss"])
def test_memory_in_chunks(suite, labels, name):
    loss, measuring = suite
    loss_fns = loss.contestants(labels, compiled=False)
    hidden = torch.randn(1, POSITIONS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.bfloat16, requires_grad=True)

    def peak(compute):
        return measuring.peak_bytes(lambda: torch.autograd.grad(compute(), (hidden, weight)))

    ordinary = peak(lambda: loss_fns[loss.ORDINARY](F.linear(hidden, weight), labels))
    chunked = peak(lambda: loss.chunked_loss(hidden, weight, labels, loss_fns[name], 8))
    assert chunked < ordinary / 4
