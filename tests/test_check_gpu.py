"""What ``scripts/check_gpu.sh`` makes of what its parts leave behind."""

import json
import subprocess
import sys

import pytest

import check_gpu
from check_gpu import Outcome, Part, Target
from jobs import ROOT


def of_step(**seconds):
    """A results file of the step benchmark, MFU in inverse proportion to the time."""
    results = {
        name.replace("_", " "): {"measurement": {"seconds": [value] * 3}, "mfu": 0.4 / value}
        for name, value in seconds.items()
    }
    return {"by_batch": {"8": results}}


@pytest.mark.parametrize(
    ("recovery", "superposition", "missed"),
    [
        (1.0, 1.0, []),
        (1.004, 1.004, []),
        (1.02, 1.02, ["recovery over TorchTitan", "MFU of recovery", "MFU of superposition"]),
        (1.0, 1.04, ["superposition s6 over recovery", "MFU of superposition"]),
    ],
)
def test_targets_of_a_step(tmp_path, recovery, superposition, missed):
    results = of_step(TorchTitan=1.0, recovery=recovery, superposition_s6=superposition)
    (tmp_path / "step.json").write_text(json.dumps(results))
    targets = check_gpu.step_targets(tmp_path)
    assert len(targets) == 4
    found = [target.what for target in targets if not target.met]
    assert len(found) == len(missed)
    assert all(what.startswith(name) for what, name in zip(found, missed, strict=True))


def test_out_of_memory_meets_no_target(tmp_path):
    times = {"bag loss": {"seconds": []}, "cross-entropy": {"seconds": [1.0]}}
    (tmp_path / "loss.json").write_text(json.dumps({"loss_alone": {"eager": {"16": times}}}))
    (target,) = check_gpu.loss_targets(tmp_path)
    assert not target.met


@pytest.mark.parametrize(("measured", "met"), [(1.09, True), (0.91, True), (1.11, False)])
def test_targets_of_memory(tmp_path, measured, met):
    peaks = {"recovery": {"measured": measured, "dry_run": 1.0}}
    (tmp_path / "memory.json").write_text(json.dumps({"peak_bytes": peaks}))
    (target,) = check_gpu.memory_targets(tmp_path)
    assert target.met is met


def test_targets_of_tests(tmp_path):
    """Of those that ran, though the part was out of time."""
    log = ["python -m pytest -v", "tests/test_gpu.py::test_a[x y] PASSED  [ 3%]"]
    log += ["tests/test_gpu.py::test_b FAILED [ 6%]", "tests/test_gpu.py::test_c ERROR [ 9%]"]
    (tmp_path / "log.txt").write_text("\n".join([*log, "tests/test_gpu.py::test_d "]))
    passed, failed = check_gpu.test_targets(tmp_path)
    assert (passed.value, failed.value) == (1, 2)
    assert passed.met and not failed.met


def part(name, code, targets=lambda folder: [], seconds=20.0):
    return Part(name, name, [sys.executable, "-c", code], seconds, targets, "table.txt")


def test_a_part_that_fails_or_hangs_keeps_what_it_wrote(tmp_path):
    figures = str(tmp_path / "good" / "table.json")
    hangs = "import subprocess, sys, time; print('begun', flush=True);"
    hangs += (
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    )
    parts = [
        part(
            "good",
            f"open({figures!r}, 'w').write('[2.5]')",
            lambda folder: [Target("figure", 1.0, at_most=2)],
        ),
        part("missed", "", lambda folder: [Target("figure", 3.0, at_most=2)]),
        part("fails", "print('why'); raise SystemExit(3)"),
        part("hangs", hangs, seconds=2.0),
        part("empty", "", lambda folder: {}["x"]),
    ]
    (tmp_path / "fails").mkdir()
    (tmp_path / "fails" / "table.json").write_text("1")  # of an earlier check
    outcomes = [check_gpu.run(p, tmp_path / p.name, tiny=False) for p in parts]
    assert [check_gpu.verdict(outcome, tiny=False) for outcome in outcomes] == [
        *("met", "missed a target", "failed: exit code 3", "failed: not finished after 2 s"),
        "failed: no figures: KeyError('x')",
    ]
    assert outcomes[3].seconds < 10
    check_gpu.write_report(tmp_path, check_gpu.machine(), outcomes, tiny=False)
    report = (tmp_path / "report.md").read_text()
    assert "why" in report and "begun" in report
    assert "figure: 3 (at most 2) **missed**" in report
    results = json.loads((tmp_path / "results.json").read_text())
    assert [p["part"] for p in results["parts"]] == [p.name for p in parts]
    assert [p["figures"] for p in results["parts"]] == [[2.5], None, None, None, None]
    assert results["machine"]["torch"]
    assert sum(outcome.falls_short(tiny=False) for outcome in outcomes) == 4


def test_figures_of_tiny_shapes_are_not_judged():
    outcome = Outcome(part("p", ""), targets=[Target("figure", 3.0, at_most=2)])
    assert outcome.falls_short(tiny=False) and not outcome.falls_short(tiny=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "No GPU found"), (["--tiny", "--parts", "los"], "no los; choose from tests, step-600M")],
)
def test_what_cannot_be_checked_is_said_at_once(arguments, message):
    command = [sys.executable, ROOT / "scripts" / "check_gpu.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode
    assert message in result.stderr


def test_time_limits_fit_into_nine_minutes(tmp_path):
    assert sum(p.seconds for p in check_gpu.parts(tmp_path, 1, tiny=False)) <= 9 * 60


@pytest.mark.slow
def test_every_command_runs_with_tiny_shapes(tmp_path):
    command = ["scripts/check_gpu.sh", "--tiny", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "report.md").read_text().count("| ran |") == 5
