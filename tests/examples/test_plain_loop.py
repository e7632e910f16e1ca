"""The plain PyTorch example: its numbers are the trainer's, and it resumes exactly."""

import contextlib
import copy
import re
import sys
import sysconfig
from pathlib import Path
from unittest import mock

import pytest
import torch
from loading import EXAMPLES, load_example
from torch.utils._pytree import tree_leaves

import launches
from jobs import BOUNDARY, ON, STEPS, B, L, RecordingTrainer, S
from torchtitan.experiments.tst.core import Schedule
from torchtitan.experiments.tst.core.conformance import check, load

example = load_example("plain_loop")
SMALL = {"B": 2, "L": 16}
SCHEDULE = Schedule.of([S], [BOUNDARY])


@contextlib.contextmanager
def reporting(after_step, **sizes):
    """Give the example its B and L; call a function after each step with its tokens and loss."""
    train_step = example.train_step

    def reporting_step(model, optimizer, scheduler, bag_size, inputs, labels):
        loss = train_step(model, optimizer, scheduler, bag_size, inputs, labels)
        after_step(inputs, labels, loss.item())
        return loss

    with mock.patch.multiple(example, train_step=reporting_step, **sizes):
        yield


def windows_of(batches):
    """The tokens of batches, in the order of the stream: (N,)."""
    windows = [torch.cat([inputs, labels[:, -1:]], 1).flatten() for inputs, labels in batches]
    return torch.cat(windows)


def leaves(state):
    """The values of a checkpoint, as tensors."""
    return [torch.as_tensor(leaf) for leaf in tree_leaves(state) if leaf is not None]


def test_loss_and_gradients_are_the_trainers(train, tmp_path):
    """Of each step, in superposition and in recovery; the weights stay the initial ones."""
    trainers, expected, found = [], [], []

    class Trainer(RecordingTrainer):
        def before_clipping(self, parameters):
            super().before_clipping(parameters)
            model = self.model_parts[0]
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            expected.append((torch.stack(self._losses).sum().item(), gradients))

        def close(self):
            trainers.append(self)
            super().close()

    train(*ON, "--optimizer.lr=0", trainer_class=Trainer)
    model = copy.deepcopy(trainers[0].model_parts[0])
    gradients = {}
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(  # before clipping
            lambda p, name=name: gradients.update({name: p.grad.clone()})
        )
    tokens = windows_of(trainers[0].read)

    def keep(inputs, labels, loss):
        found.append((loss, dict(gradients)))

    with reporting(keep, B=B, L=L):
        held_out = tokens[: 2 * (L + 1)].view(2, -1)
        example.train(model, tokens, held_out, SCHEDULE, STEPS, tmp_path, lr=0.0)
    assert len(found) == len(expected) == STEPS
    for (loss, own), (trainers_loss, trainers_own) in zip(found, expected, strict=True):
        assert loss == pytest.approx(trainers_loss, rel=1e-6)
        assert own.keys() == trainers_own.keys()
        for name, gradient in own.items():
            torch.testing.assert_close(gradient, trainers_own[name], rtol=0, atol=1e-6)


def test_script_trains_through_the_boundary(tmp_path):
    library = Path(sysconfig.get_path("stdlib"))
    files = [str(library / name) for name in ("argparse.py", "typing.py", "tarfile.py")]
    args = [*files, "--steps=20", f"--out={tmp_path / 'run'}"]
    script = str(EXAMPLES / "plain_loop.py")
    first = launches.succeeded(launches.fork(script, args, 1, tmp_path / "first")).output
    pattern = r"step (\d+)  (\w+)  loss (\S+)  validation loss (\S+)"
    found = re.findall(pattern, first)
    assert [(step, phase) for step, phase, *_ in found] == [
        ("6", "superposition"),
        ("20", "recovery"),
    ]
    losses = [float(validation) for *_, validation in found]
    assert losses[1] < losses[0] < 5.7  # log 256 is 5.55
    assert losses[1] < 4.5

    args.append(f"--resume={tmp_path / 'run' / 'step-6.pt'}")
    again = launches.succeeded(launches.fork(script, args, 1, tmp_path / "again")).output
    assert re.findall(pattern, again) == found[1:]


class Run:
    """A run of the example with a small model, and a checkpoint of each step."""

    def __init__(self, folder, seed=0, resume=None):
        torch.manual_seed(seed)
        stream = torch.arange(10_000) * 7919 % 251
        self.batches, self.losses = [], []
        folder.mkdir(exist_ok=True)
        held_out = stream[-17:].view(1, -1)
        with reporting(self.record, **SMALL):
            args = (example.Model(dim=16, layers=1), stream, held_out, SCHEDULE, STEPS, folder)
            example.train(*args, resume=resume, every=1)

    def record(self, inputs, labels, loss):
        self.batches.append((inputs, labels))
        self.losses.append(loss)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plain_loop")


@pytest.fixture(scope="module")
def whole(folder):
    return Run(folder)


@pytest.mark.parametrize("step", [2, BOUNDARY, 4], ids=["superposition", "boundary", "recovery"])
def test_resume_is_exact(whole, folder, tmp_path, step):
    """Bit for bit, also the last checkpoint; the new process begins with other weights."""
    resumed = Run(tmp_path, seed=1, resume=folder / f"step-{step}.pt")
    assert resumed.losses == whole.losses[step:]
    last, expected = (torch.load(path / f"step-{STEPS}.pt") for path in (tmp_path, folder))
    assert last.keys() == {"model", "optimizer", "scheduler", "step", "position"}
    torch.testing.assert_close(leaves(last), leaves(expected), rtol=0, atol=0)


def test_each_token_is_read_once_and_in_order(whole):
    read = windows_of(whole.batches)
    assert torch.equal(read, torch.arange(len(read)) * 7919 % 251)
    lengths = [inputs.shape[1] for inputs, _ in whole.batches]
    assert lengths == [S * 16] * BOUNDARY + [16] * (STEPS - BOUNDARY)


def test_learning_rate_has_one_schedule_over_both_phases(tmp_path):
    """It warms up in the first 5 % of all steps, decays in the last 20 %, and has no other step."""
    rates = []

    def step(model, optimizer, scheduler, bag_size, inputs, labels):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        return torch.zeros(())

    tokens = torch.zeros(10_000, dtype=torch.int64)
    with mock.patch.multiple(example, **SMALL, train_step=step):
        args = (example.Model(dim=16, layers=1), tokens, tokens[None, :17])
        example.train(*args, Schedule.of([S], [12]), 40, tmp_path, lr=1.0)
    assert rates == pytest.approx([0.5] + [1.0] * 32 + [1 - i / 8 for i in range(1, 8)])


def test_the_optimizer_counts_the_steps_of_both_phases(folder, whole):
    for step in range(1, STEPS + 1):
        state = torch.load(folder / f"step-{step}.pt")
        assert {of["step"].item() for of in state["optimizer"]["state"].values()} == {step}


def test_without_superposition_each_step_is_ordinary(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "fold", None)
    monkeypatch.setattr("test_plain_loop.SCHEDULE", Schedule.of([S], [0]))
    run = Run(tmp_path)
    assert [inputs.shape for inputs, _ in run.batches] == [(2, 16)] * STEPS


def test_too_little_text_is_refused_before_training(tmp_path):
    too_little = torch.zeros(491, dtype=torch.uint8)
    with (
        mock.patch.multiple(example, **SMALL),
        pytest.raises(ValueError, match="6 steps read 492 tokens, but the text has 491"),
    ):
        example.train(None, too_little, None, SCHEDULE, STEPS, tmp_path)


def test_an_interrupted_save_leaves_the_checkpoint(folder, whole, tmp_path, monkeypatch):
    def interrupted(state, file):
        Path(file).write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "step-1.pt").write_bytes((folder / "step-1.pt").read_bytes())
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path)
    assert (tmp_path / "step-1.pt").read_bytes() == (folder / "step-1.pt").read_bytes()


def test_conforms(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    results = check(load(EXAMPLES / "plain_loop_conformance.py"))
    assert [result for result in results if result.problem] == []


def test_is_short():
    assert len((EXAMPLES / "plain_loop.py").read_text().splitlines()) < 120
