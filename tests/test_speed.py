"""What the bag loss costs beside one cross-entropy; ``scripts/benchmark/loss.py`` at full size."""

import weakref

import pytest
import torch
import torch.nn.functional as F

from jobs import ROOT

# the paper's vocabulary; with 32,000 both losses take about the same time
POSITIONS, VOCABULARY, WIDTH, BAG_SIZE = 96, 128_256, 16, 16


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


def test_memory_of_the_loss(suite, labels):
    loss, measuring = suite
    logits = torch.randn(1, POSITIONS, VOCABULARY, dtype=torch.bfloat16, requires_grad=True)
    loss_fns = loss.contestants(labels, compiled=False)

    def peak(name):
        compute = loss_fns[name]
        return measuring.peak_bytes(lambda: torch.autograd.grad(compute(logits, labels), logits))

    assert peak(loss.BAG) < peak(loss.ORDINARY) / 4


@pytest.mark.slow  # it needs the cores for itself
def test_time_of_the_loss(suite, labels):
    loss, _ = suite
    logits = torch.randn(1, POSITIONS, VOCABULARY, dtype=torch.bfloat16)
    results = loss.loss_alone(logits, labels, rounds=5, compiled=False)
    ordinary, bag, paper = (
        min(results[name].seconds) for name in (loss.ORDINARY, loss.BAG, loss.PAPER)
    )
    assert bag / ordinary < 0.75  # 0.2 to 0.4
    assert paper / bag > 10


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


def test_one_contestant_out_of_memory_leaves_the_others(suite):
    _, measuring = suite
    runs = 0

    def too_large():
        nonlocal runs
        runs += 1
        if runs > 4:  # in the second round
            raise torch.OutOfMemoryError("none left")

    results = measuring.measure({"fits": lambda: None, "too large": too_large}, rounds=3)
    assert len(results["fits"].seconds) == 3
    assert results["too large"].out_of_memory
    assert results["too large"].json()["median_seconds"] is None
    rows = suite[0].rows(results, lambda name: "fits")
    assert rows[1][:2] == ["too large", "out of memory"]


@pytest.fixture(scope="module")
def step(suite):
    import step

    return step


def test_nothing_is_left_of_the_trainers_of_a_local_batch(
    step, base_args, tmp_path, monkeypatch, one_process
):
    """On a GPU the next ones would not fit beside them."""
    built = []
    build = step.build_trainers

    def recorded(*args):
        made = build(*args)
        built.extend(weakref.ref(trainer) for trainer in made.values())
        return made

    monkeypatch.setattr(step, "build_trainers", recorded)
    step.random_tokens(tmp_path / "tokens", 1000)
    for batch in (2, 4):
        results = step.measure_batch(base_args, tmp_path, batch, [2], 1)
        step.free_memory()
        assert len(results) == 3
        assert [trainer() for trainer in built] == [None] * len(built)
