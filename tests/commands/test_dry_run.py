"""``tst dry-run`` as a user runs it: a line for each job, whatever becomes of the others."""

import os
import signal
import sys

from torchtitan.experiments.tst.planning import trials
from torchtitan.experiments.tst.planning.plan import GPUS, Gpu

DEMO = "train_configs/demo/tst.toml"
PAPER = "train_configs/paper/270M-20k-tst.toml"


def test_command(tst):
    result = tst("dry-run", DEMO, PAPER, "--training.local_batch_size=2048")
    assert result.code == 1
    first, second = result.stdout.splitlines()
    assert "CANNOT RUN: training.global_batch_size = 64" in first
    assert "CANNOT RUN: training.global_batch_size = 1024" in second
    assert "2 of 2 jobs cannot run, do not fit or were not tried" in result.stderr
    result = tst("dry-run", "--gpu", "A100", DEMO, "--ranks", 2)
    assert result.code == 0 and result.stdout.count("GB") == 2
    result = tst("dry-run", "--training.local_batch_size=2048", DEMO, "--no-memory")
    assert result.code == 1 and "CANNOT RUN: training.global_batch_size = 64" in result.stdout


def test_command_says_what_does_not_fit(tst, monkeypatch):
    monkeypatch.setitem(GPUS, "A100", Gpu("A100", 312e12, 50e6))
    result = tst("dry-run", "--gpu", "A100", DEMO)
    assert result.code == 1
    assert "TOO MUCH for 0 GB less 10 %" in result.stdout


def test_command_tries_every_job(tst, tmp_path, monkeypatch):
    """Whatever becomes of those before."""
    broken = tmp_path / "broken.toml"
    broken.write_text("[job")

    def faulty(config, *args):
        if config.job.description == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        if config.job.description == "exits":
            sys.exit("its import ends the process")
        raise RuntimeError("a fault\nof two lines")

    monkeypatch.setattr(trials, "dry_run", faulty)
    kills = tmp_path / "kills.toml"
    kills.write_text('[job]\ndescription = "kills"\n')
    exits = tmp_path / "exits.toml"
    exits.write_text('[job]\ndescription = "exits"\n')
    result = tst("dry-run", broken, DEMO, kills, exits, DEMO)
    assert result.code == 1
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    assert "COULD NOT BE TRIED: SystemExit: its import ends the process" in lines.pop(3)
    assert "CANNOT RUN: job.config_file" in lines[0]
    assert "COULD NOT BE TRIED: its process was killed" in lines[2]
    for line in (lines[1], lines[3]):
        assert "COULD NOT BE TRIED: RuntimeError: a fault of two lines" in line
