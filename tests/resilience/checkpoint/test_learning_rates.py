"""The rate that a step uses, and that is logged, is the job's own at that step."""

import pytest

from jobs import SAVE, STEPS, column
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

RATE = 0.01
JOB = (*SAVE, f"--optimizer.lr={RATE}", "--lr_scheduler.warmup_steps=2")


@pytest.fixture
def rates(train):
    """Train, and give the rates used in the steps of this launch."""

    def run(*args):
        class Trainer(SuperpositionTrainer):
            def train_step(self, data_iterator):
                (group,) = [g for o in self.optimizers for g in o.param_groups]
                used[self.step] = group["lr"]
                super().train_step(data_iterator)

        used = {}
        lines = train(*JOB, *args, trainer_class=Trainer)
        logged = dict(zip(column(lines, "step"), column(lines, "lr"), strict=True))
        assert {step: logged[step] for step in used} == used
        return used

    return run


def schedule(steps, peak=RATE):
    """Two steps of warmup, then linear decay to a virtual last step: TorchTitan's default."""
    return {n: peak * min(n / 2, 1, (steps + 1 - n) / (steps - 2)) for n in range(1, steps + 1)}


def test_a_run_that_was_extended_after_its_end(rates):
    assert rates() == pytest.approx(schedule(STEPS))
    longer = schedule(12)
    assert rates("--training.steps=12") == pytest.approx(
        {step: longer[step] for step in range(STEPS + 1, 13)}
    )


@pytest.mark.parametrize("left_out", ["optimizer", "optimizer,train_state", "train_state"])
def test_states_that_are_not_loaded(rates, left_out):
    rates("--training.steps=4")
    found = rates("--training.steps=8", f"--checkpoint.exclude_from_loading={left_out}")
    expected = schedule(8)
    if "train_state" in left_out:  # counts from 1, along the schedule that was loaded
        first = {step: expected[step + 4] for step in range(1, 5)}
        assert {step: found[step] for step in first} == pytest.approx(first)
    else:
        assert found == pytest.approx({step: expected[step] for step in range(5, 9)})


def test_a_schedule_that_is_not_loaded_begins_anew(rates):
    rates("--training.steps=4")
    found = rates("--training.steps=8", "--checkpoint.exclude_from_loading=lr_scheduler")
    assert found == pytest.approx({step + 4: schedule(8)[step] for step in range(1, 5)})


def test_a_changed_peak(rates, warnings):
    rates("--training.steps=4")
    found = rates("--training.steps=8", "--optimizer.lr=0.002")
    assert found == pytest.approx({n: schedule(8, 0.002)[n] for n in range(5, 9)})
    assert "optimizer.lr = 0.002, but 0.01 in the checkpoint" in warnings()
