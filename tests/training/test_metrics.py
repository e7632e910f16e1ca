"""What a run logs, and what is read of it again."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import BOUNDARY, ON, SAVE, STEPS, B, L, S, column, tensorboard_scalars, validation
from torchtitan.experiments.tst.core import Phase, Schedule
from torchtitan.experiments.tst.metrics_file import (
    TRAINING_LOSS,
    VALIDATION_LOSS,
    JsonLinesLogger,
    read_metrics,
)
from torchtitan.experiments.tst.resilience import wandb_run as wandb_module
from torchtitan.experiments.tst.training.tensorboard import LAYOUT
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer


def test_metrics_count_latents_and_data_tokens(whole):
    lines = whole.lines
    assert column(lines, "step") == list(range(1, STEPS + 1))
    assert column(lines, "phase") == ["superposition"] * 3 + ["recovery"] * 3
    assert column(lines, "superposition") == [1] * 3 + [0] * 3
    assert column(lines, "bag_size") == [S] * 3 + [1] * 3
    read = [S * B * L] * 3 + [B * L] * 3
    assert column(lines, "n_tokens_seen") == [sum(read[: i + 1]) for i in range(STEPS)]
    assert column(lines, "n_latents_seen") == [step * B * L for step in range(1, STEPS + 1)]
    assert column(lines, "loss_metrics/superposition") == column(lines)[:3]
    assert column(lines, "loss_metrics/recovery") == column(lines)[3:]
    for line in lines:  # the two are taken at slightly different moments
        ratio = line["data_throughput(tps)"] / line["throughput(tps)"]
        assert ratio == pytest.approx(line["bag_size"], rel=0.5)


def test_boundary_is_logged_and_times_are_of_a_step(train, corpus):
    lines = train(*ON, "--metrics.log_freq=5", *validation(corpus), "--validation.freq=2")
    logged = [line for line in lines if TRAINING_LOSS in line]
    assert column(logged, "step") == [1, 3, 4, 5]
    assert column(lines, "loss_metrics/superposition") == column(logged)[:2]
    # B*L latents a step on one rank: of each line since the last, training or validation
    for line in logged:
        expected = B * L / line["throughput(tps)"]
        assert line["time_metrics/end_to_end(s)"] == pytest.approx(expected, rel=0.5)
    validated = [line for line in lines if VALIDATION_LOSS in line]
    assert column(validated, "step") == [1, 2, 4, 6]
    assert column(validated, "n_latents_seen") == [step * B * L for step in (1, 2, 4, 6)]
    assert column(validated, "n_tokens_seen") == [
        B * L * tokens for tokens in (S, 2 * S, 3 * S + 1, 3 * S + 3)
    ]


def test_metrics_of_a_run_without_superposition(finished):
    lines = finished().lines
    assert column(lines, "superposition") == [0] * STEPS
    assert column(lines, "bag_size") == [1] * STEPS
    for line in lines:
        assert line["data_throughput(tps)"] == pytest.approx(line["throughput(tps)"], rel=0.5)
        assert line["n_latents_seen"] == line["n_tokens_seen"]


def test_console_line_shows_phase_and_time_left(train, caplog):
    caplog.set_level("INFO")
    train(*ON)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step:")]
    assert len(lines) == STEPS
    assert "phase: superposition (s=4)" in lines[BOUNDARY - 1]
    assert "phase: recovery (s=1)" in lines[BOUNDARY]
    assert lines[-1].endswith("time left: 0:00:00")


def test_run_folder_explains_itself(train, tmp_path):
    lines = train(*ON, *SAVE, "--metrics.enable_tensorboard")
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {
        "checkpoint",
        "config.toml",
        "metrics.jsonl",
        "tb",
    }
    scalars = tensorboard_scalars(run)
    losses = torch.tensor(column(lines), dtype=torch.float32).tolist()
    assert scalars["loss_metrics/global_avg_loss"] == losses
    assert scalars["bag_size"] == [S] * 3 + [1] * 3
    assert scalars["loss_metrics/superposition"] == losses[:3]
    patterns = [tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags]
    for pattern in patterns:
        if not re.search("validation|experts|evaluation", pattern):  # this run has none of them
            assert any(re.search(pattern, tag) for tag in scalars), pattern
    (folder,) = (run / "tb").iterdir()
    by_tokens = EventAccumulator(str(folder)).Reload()
    points = [p for phase in Phase for p in by_tokens.Scalars(f"by_data_tokens/{phase}")]
    assert [point.step for point in points] == column(lines, "n_tokens_seen")
    assert [point.value for point in points] == losses


def test_weights_and_biases_has_the_same_names(train, monkeypatch, corpus):
    logged = []
    wandb = SimpleNamespace(
        init=lambda **kwargs: None, log=lambda m, step: logged.append(m | {"step": step}), run=None
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    lines = train(*ON, "--metrics.enable_wandb", *validation(corpus), "--validation.freq=3")
    for line in lines:
        del line["phase"]  # text; there it is the number "superposition"
    assert logged == lines


@pytest.fixture
def wandb_inits(monkeypatch):
    """What W&B is told at each ``init``: id, and WANDB_RESUME in the environment."""
    inits = []

    def init(**kwargs):
        inits.append((kwargs["id"], os.environ.get("WANDB_RESUME")))

    wandb = SimpleNamespace(init=init, log=lambda *args, **kwargs: None, run=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    yield inits
    assert not [name for name in os.environ if name.startswith("WANDB_RUN")]


def test_a_requeued_job_continues_its_wandb_run(train, wandb_inits):
    job = (*ON, *SAVE, "--metrics.enable_wandb")
    train(*job, "--superposition.stop_at_boundary")
    train(*job, "--training.steps=6")
    ((first, resume), (second, resume_of_second)) = wandb_inits
    assert first == second
    assert (resume, resume_of_second) == (None, "allow")


@pytest.fixture
def wandb_run(make_config, tmp_path, wandb_inits):
    """W&B's ``init`` as a launch of the job makes it on a rank."""

    def run(*args, rank=0, metrics_rank=0):
        config = make_config("--metrics.enable_wandb", *args)
        with wandb_module.wandb_run(config, rank, metrics_rank):
            sys.modules["wandb"].init(id=os.environ.get("WANDB_RUN_ID"))
        return wandb_inits[-1]

    return run


@pytest.fixture
def checkpoints(whole, tmp_path):
    """The job has run: its checkpoints are in its folder."""
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "checkpoint").symlink_to(whole.checkpoints)


def test_a_job_that_begins_anew_starts_a_wandb_run(wandb_run):
    (first, _), (second, resume) = wandb_run(*SAVE), wandb_run(*SAVE)
    assert first and second and first != second
    assert resume is None


@pytest.mark.parametrize(
    ("args", "resumes"),
    [
        (SAVE, True),
        ((*SAVE, f"--checkpoint.load_step={STEPS}"), True),
        ((*SAVE, "--checkpoint.load_step=2"), False),  # W&B would ignore the steps after it
        ((*SAVE, "--checkpoint.load_step=0"), False),
        ((*SAVE, "--checkpoint.exclude_from_loading=train_state"), False),
        ((), False),  # no checkpoints
    ],
)
def test_only_the_newest_checkpoint_continues_a_wandb_run(wandb_run, checkpoints, args, resumes):
    (first, _), (second, resume) = wandb_run(*SAVE), wandb_run(*args)
    assert (first == second, resume) == (resumes, "allow" if resumes else None)


def test_going_back_behind_the_end_starts_a_wandb_run(wandb_run, finished, tmp_path):
    args = ("--checkpoint.enable", "--checkpoint.interval=4")
    shutil.copytree(finished(*args).checkpoints, tmp_path / "run" / "checkpoint")
    ((first, _), (again, _)) = wandb_run(*args), wandb_run(*args)
    assert again == first, "launched again, with nothing left to log"
    assert wandb_run(*args, "--checkpoint.load_step=4")[0] != first


def test_what_the_user_told_wandb_wins(wandb_run, checkpoints, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_RUN_ID", "mine")
        assert wandb_run(*SAVE) == ("mine", "allow")
        assert os.environ["WANDB_RUN_ID"] == "mine"
        patch.setenv("WANDB_RESUME", "must")
        assert wandb_run(*SAVE) == ("mine", "must")
        assert os.environ["WANDB_RESUME"] == "must"
    assert wandb_run(*SAVE) == ("mine", "allow"), "without the variable, the same run"
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_FORK_FROM", "other?_step=3")
        assert wandb_run(*SAVE) == (None, None)


def test_ranks_have_wandb_runs_of_their_own(wandb_run, checkpoints, monkeypatch, tmp_path):
    every = (*SAVE, "--metrics.save_for_all_ranks")
    ids = [wandb_run(*every, rank=rank, metrics_rank=2)[0] for rank in range(4)]
    assert len(set(ids)) == 4
    assert [wandb_run(*every, rank=rank, metrics_rank=2)[0] for rank in range(4)] == ids
    assert wandb_run(*SAVE, rank=1, metrics_rank=1)[0] == ids[2], "in another layout"
    written = {path.name: path.read_text() for path in (tmp_path / "run").glob("wandb_run_id*")}
    assert wandb_run(*SAVE, rank=0, metrics_rank=1) == (None, None), "does not log"
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_RUN_ID", "mine")
        mine = [wandb_run(*every, rank=rank, metrics_rank=2)[0] for rank in range(3)]
    assert mine == ["mine-rank-0", "mine-rank-1", "mine"]
    assert set(written) == {"wandb_run_id", *(f"wandb_run_id-rank-{n}" for n in (0, 1, 3))}


def test_flops_are_those_of_the_latents(train, caplog):
    """MFU would be overstated s-fold by data tokens, and with shorter sequences by attention."""
    flops = {}

    class Trainer(SuperpositionTrainer):
        def train_step(self, data_iterator):
            super().train_step(data_iterator)
            flops[scale, self.step] = self.metrics_processor.num_flops_per_token

    for scale in ("sequence", "batch"):
        train(*ON, f"--superposition.scale={scale}", trainer_class=Trainer)
    assert flops["sequence", 1] == flops["sequence", STEPS] == flops["batch", STEPS]
    layers, dim = 2, 64
    saved = 6 * layers * 2 * dim * (L - L // S)  # upstream's count of attention's FLOPs
    assert flops["sequence", 1] - flops["batch", 1] == saved


def test_lines_that_a_later_launch_went_back_behind_are_left_out(tmp_path):
    def write(*steps, loss):
        log = JsonLinesLogger(tmp_path / "metrics.jsonl", Schedule.of([4], [2]))
        for step in steps:
            log.log({TRAINING_LOSS: loss}, step)
        log.log({VALIDATION_LOSS: loss}, steps[-1])
        log.close()

    write(1, 2, 3, loss=0.0)
    write(3, 4, loss=1.0)  # resumed from step 2
    lines = read_metrics(tmp_path)
    losses = [(line["step"], line.get(TRAINING_LOSS)) for line in lines]
    assert losses == [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0), (4, None)]
    assert [line["phase"] for line in lines[:3]] == ["superposition"] * 2 + ["recovery"]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line), dict)


def test_validations_that_a_later_launch_went_back_behind_are_left_out(tmp_path):
    log = JsonLinesLogger(tmp_path / "metrics.jsonl", Schedule())
    for launch, steps in enumerate(([1, 4, 8, 12], [6, 8, 12, 16])):
        for step in steps:
            if step in (1, 16):
                log.log({TRAINING_LOSS: 0.0}, step)
            log.log({VALIDATION_LOSS: float(launch)}, step)
    log.close()
    validated = [line for line in read_metrics(tmp_path) if VALIDATION_LOSS in line]
    losses = [(line["step"], line[VALIDATION_LOSS]) for line in validated]
    assert losses == [(1, 0.0), (4, 0.0), (6, 1.0), (8, 1.0), (12, 1.0), (16, 1.0)]


def test_a_line_that_a_kill_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss_metrics/global_avg_loss": 0.0}\n{"step": 2, "loss_met')
    log = JsonLinesLogger(path, Schedule())
    log.log({TRAINING_LOSS: 1.0}, 2)
    log.close()
    lines = [(line["step"], line[TRAINING_LOSS]) for line in read_metrics(tmp_path)]
    assert lines == [(1, 0.0), (2, 1.0)]


def test_a_full_disk_names_the_file():
    log = JsonLinesLogger(Path("/dev/full"), Schedule())
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        log.log({TRAINING_LOSS: 1.0}, 1)
