"""``tst sweep``: its configs, what it runs, and what it makes of the results."""

import csv
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import tomli

from jobs import ROOT
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.planning import surface_plots
from torchtitan.experiments.tst.planning import sweep as planning
from torchtitan.experiments.tst.results.sweep import results, run_unfinished, write_table

PAPER = "train_configs/paper"
BAG_SIZE, STEP_RATIO = "superposition.bag_size", "superposition.step_ratio"


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(
        """
[job]
dump_folder = "run"
[superposition]
bag_size = 4
steps = 3
[model]
name = "llama3"
flavor = "demo"
[training]
steps = 10
local_batch_size = 4
"""
    )
    return str(path)


def make(tmp_path, job, *vary):
    return planning.make(tmp_path / "sweep", job, planning.parse_vary(vary), [])


def test_a_sweep_is_every_combination_and_one_baseline(tmp_path, job):
    points = make(tmp_path, job, f"{BAG_SIZE}=1,2,4", f"{STEP_RATIO}=0,0.3,0.5")
    assert [(p.values[STEP_RATIO], p.values[BAG_SIZE]) for p in points] == [
        *((None, None), (0.3, 2), (0.5, 2), (0.3, 4), (0.5, 4))
    ]
    baseline, first = (tomli.loads((tmp_path / "sweep" / f"{n}.toml").read_text()) for n in (0, 1))
    assert "superposition" not in baseline
    # the ratio takes the place of the job's number of steps
    assert first["superposition"] == {"bag_size": 2, "step_ratio": 0.3}
    assert first["job"]["dump_folder"].endswith("sweep/runs/bag_size=2,step_ratio=0.3")
    assert first["training"] == {"steps": 10, "local_batch_size": 4}


def test_a_schedule_is_a_value(tmp_path, job):
    """A list in brackets, of stages or of any key that takes one."""
    points = make(
        tmp_path,
        job,
        f"{BAG_SIZE}=4,[8,4,2],[3]",
        "superposition.reinit_at_recovery=output,[tok_embeddings,output]",
    )
    assert [point.name for point in points[::2]] == [
        f"bag_size={sizes},reinit_at_recovery=output" for sizes in ("4", "8-4-2", "3")
    ]
    assert points[1].name == "bag_size=4,reinit_at_recovery=tok_embeddings-output"
    assert [p.toml["superposition"]["bag_size"] for p in points[::2]] == [4, [8, 4, 2], [3]]
    assert points[1].values["superposition.reinit_at_recovery"] == ["tok_embeddings", "output"]
    for number, point in enumerate(points):
        path = tmp_path / "sweep" / f"{number}.toml"
        config = SuperpositionConfigManager().parse_args([f"--job.config_file={path}"])
        assert config.superposition.bag_size == point.values[BAG_SIZE]


def test_schedules_and_ratios_in_the_table_and_the_plot(tmp_path, job, monkeypatch):
    """With stages there is no surface: a line for each share, over the schedules."""
    points = make(tmp_path, job, f"{BAG_SIZE}=1,4,[8,4]", f"{STEP_RATIO}=0.3,0.5")
    for point, loss in zip(points, (3.0, 2.9, 2.8, 2.7, 2.6), strict=True):
        write_metrics(tmp_path / "sweep" / "runs" / point.name, 10, loss)
    drawn = []
    monkeypatch.setattr(surface_plots, "draw_lines", lambda lines, *rest: drawn.append(lines))
    table = list(write_table(tmp_path / "sweep"))
    assert any(line.split()[1:4] == ["8,", "4", "0.3000"] for line in table)
    assert drawn == [
        {
            "baseline": [("baseline", 3.0)],
            f"{STEP_RATIO} = 0.3": [(4, 2.9), ("8, 4", 2.7)],
            f"{STEP_RATIO} = 0.5": [(4, 2.8), ("8, 4", 2.6)],
        }
    ]


def test_a_sweep_of_learning_rates(tmp_path, job):
    points = make(tmp_path, job, "optimizer.lr=1e-3,2e-3", f"{BAG_SIZE}=1,4")
    assert [p.name for p in points] == [
        *("baseline,lr=0.001", "lr=0.001,bag_size=4", "baseline,lr=0.002", "lr=0.002,bag_size=4")
    ]
    assert [p.toml["optimizer"]["lr"] for p in points] == [1e-3, 1e-3, 2e-3, 2e-3]


def test_a_sweep_is_made_again_but_not_over_another(tmp_path, job):
    make(tmp_path, job, f"{BAG_SIZE}=2,4")
    make(tmp_path, job, f"{BAG_SIZE}=2,4")
    with pytest.raises(ValueError, match="holds another sweep"):
        make(tmp_path, job, f"{BAG_SIZE}=2")
    assert len(json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]) == 2


def test_the_command_of_a_sweep_can_be_pasted(tmp_path, job, tst, monkeypatch):
    repository = tmp_path / "the repository"
    script = repository / "scripts/slurm/train.sbatch"
    script.parent.mkdir(parents=True)
    script.touch()
    monkeypatch.setattr(planning, "_ROOT", repository)
    result = tst("sweep", "make", tmp_path / "my sweep", job, "--vary", f"{BAG_SIZE}=2,4")
    assert shlex.split(result.stdout.splitlines()[-1]) == [
        f"CONFIG_FILE={tmp_path / 'my sweep'}",
        *("sbatch", "--array=0-1", os.path.relpath(script, ROOT)),
    ]
    script.unlink()  # as for pip users
    result = tst("sweep", "make", tmp_path / "my sweep", job, "--vary", f"{BAG_SIZE}=2,4")
    assert shlex.split(result.stdout.splitlines()[-1]) == [
        *("tst", "sweep", "run", str(tmp_path / "my sweep"))
    ]


def test_nothing_is_written_of_a_sweep_that_cannot_run(tmp_path, job):
    with pytest.raises(ValueError, match=r"superposition.step_ratio = 1.5: must be in \[0, 1\)"):
        make(tmp_path, job, f"{STEP_RATIO}=0.3,1.5")
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_of_a_nested_key(tmp_path, job):
    key = "quantize.linear.float8.recipe_name"
    points = make(tmp_path, job, f"{key}=tensorwise,rowwise")
    for number, point in enumerate(points):
        config = SuperpositionConfigManager().parse_args(
            [f"--job.config_file={tmp_path / 'sweep' / f'{number}.toml'}"]
        )
        assert config.quantize.linear.float8.recipe_name == point.values[key]


def test_a_sweep_is_not_made_anew_over_its_runs(tmp_path, job):
    make(tmp_path, job, f"{BAG_SIZE}=2,4")
    before = (tmp_path / "sweep" / "0.toml").read_text()
    Path(job).write_text(
        Path(job).read_text().replace("local_batch_size = 4", "local_batch_size = 8")
    )
    with pytest.raises(ValueError, match=r"holds another sweep: 0\.toml differs"):
        make(tmp_path, job, f"{BAG_SIZE}=2,4")
    assert (tmp_path / "sweep" / "0.toml").read_text() == before


def test_the_papers_own_sweep_beside_the_papers_losses(tmp_path, monkeypatch):
    """Of the model, length and weighting of the paper's table, its baseline first."""
    monkeypatch.chdir(ROOT)
    job = f"{PAPER}/ablations/600M-20k-power-law.toml"
    points = make(tmp_path, job, f"{BAG_SIZE}=1,6", f"{STEP_RATIO}=0.3")
    drawn = []
    monkeypatch.setattr(
        surface_plots, "draw_surfaces", lambda surfaces, output: drawn.append(surfaces)
    )
    write_metrics(tmp_path / "sweep" / "runs" / points[0].name, 20_000, 3.0)
    list(write_table(tmp_path / "sweep"))
    assert not drawn, "a baseline alone is no plot"
    write_metrics(tmp_path / "sweep" / "runs" / points[1].name, 20_000, 2.9)
    list(write_table(tmp_path / "sweep"))
    (own, of_paper) = drawn[0].values()
    assert (own.baseline, own.values) == (3.0, {(0.3, 6): 2.9})
    assert (of_paper.model, of_paper.weighting) == ("600M", "power_law")
    assert own.parameters == of_paper.parameters


def test_a_run_is_finished_at_the_last_step_that_is_logged(tmp_path, job):
    (point,) = planning.make(
        tmp_path / "sweep", job, {BAG_SIZE: ["4"]}, ["--training.steps=49", "--metrics.log_freq=10"]
    )
    for step, finished in ((39, False), (40, True)):
        folder = tmp_path / "sweep" / "runs" / point.name
        shutil.rmtree(folder, ignore_errors=True)
        write_metrics(folder, step, 3.0)
        (result,) = results(tmp_path / "sweep")
        assert result.finished == finished


def test_a_run_is_finished_after_its_last_validation(tmp_path, job):
    arguments = ["--validation.enable", "--validation.freq=5", "--metrics.log_freq=5"]
    (point,) = planning.make(tmp_path / "sweep", job, {BAG_SIZE: ["4"]}, arguments)
    assert point.last_validated == point.steps == 10
    metrics = tmp_path / "sweep" / "runs" / point.name / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    loss, validation = "loss_metrics/global_avg_loss", "validation_metrics/loss"
    lines = [{"step": 5, loss: 3.0}, {"step": 5, validation: 3.0}, {"step": 10, loss: 3.0}]
    for more, finished in (([], False), ([{"step": 10, validation: 3.0}], True)):
        metrics.write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, *more]))
        (result,) = results(tmp_path / "sweep")
        assert result.finished == finished
    sweep = tmp_path / "sweep" / "sweep.json"
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    sweep.write_text(sweep.read_text().replace('"last_validated": 10', '"unknown": 10'))
    (result,) = results(tmp_path / "sweep")
    assert result.finished, "a sweep of an older version"


TST = """\
#!/usr/bin/env python3
# Stands for python -m torchtitan.experiments.tst train FOLDER/N.toml --nproc=1
import os, pathlib, sys, time

assert sys.argv[1:4] == ["-m", "torchtitan.experiments.tst", "train"]
assert sys.argv[5:] == ["--nproc=1"]
number = pathlib.Path(sys.argv[4]).stem
with pathlib.Path(__file__).with_name("launched").open("a") as file:
    print("run", number, file=file)
print("run", number)
if number == os.environ["FAILS"]:
    sys.exit(3)
time.sleep(float(os.environ.get("SLEEP", 0)))
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_of_a_sweep_that_are_not_finished(tmp_path, job, tst, monkeypatch, jobs):
    points = make(tmp_path, job, "optimizer.lr=1e-3,2e-3,3e-3,4e-3")
    folder, launched = tmp_path / "sweep", tmp_path / "launched"
    write_metrics(folder / "runs" / points[1].name, 10, 3.0)
    python = tmp_path / "python"
    python.write_text(TST)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("FAILS", "none")
    result = tst("sweep", "run", folder, "--jobs", jobs, "--nproc", 1)
    assert result.code == 0, result.stderr
    assert sorted(launched.read_text().splitlines()) == ["run 0", "run 2", "run 3"]
    assert "1 of 4 runs are finished" in result.stdout
    assert "[4/4] lr=0.004: 0:00:0" in result.stdout
    if jobs > 1:
        assert (folder / "3.log").read_text() == "run 3\n"

    launched.unlink()
    run_unfinished(folder, jobs, 1, print, skip={points[0].name, points[3].name})
    assert launched.read_text() == "run 2\n"

    monkeypatch.setenv("FAILS", "0")
    monkeypatch.setenv("SLEEP", "2")  # of the other one at work, while the first fails
    launched.unlink()
    result = tst("sweep", "run", folder, "--jobs", jobs, "--nproc", 1)
    assert result.code == 1
    assert "lr=0.001 ended with exit code 3" in result.stderr
    assert "run 3" not in launched.read_text(), "no others are started"


def write_metrics(folder, step, loss, validation=None):
    lines = [{"step": step, "phase": "recovery", "loss_metrics/global_avg_loss": loss}]
    if validation:
        lines.append({"step": step, "phase": "recovery", "validation_metrics/loss": validation})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    "vary",
    [
        [f"{BAG_SIZE}=1,2,4", f"{STEP_RATIO}=0.3"],
        ["optimizer.lr=1e-3,1e-2,1e-1"],
        ["superposition.weighting=uniform,power_law,fitted"],
    ],
)
def test_a_table_and_a_plot_of_what_is_there(tmp_path, job, vary, tst):
    folder = tmp_path / "sweep"
    points = make(tmp_path, job, *vary)
    for number, (point, step) in enumerate(zip(points, (10, 10, 6), strict=True)):
        write_metrics(folder / "runs" / point.name, step, 3.0 - number, 2.5 - number)
    result = tst("sweep", "table", folder)
    assert result.code == 0 and "2 of 3 runs finished" in result.stdout
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["10", "10", "6"]
    assert [float(row["training_loss"]) for row in rows] == [3.0, 2.0, 1.0]
    assert [float(row["validation_loss"]) for row in rows] == [2.5, 1.5, 0.5]
    assert (folder / "losses.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["table", "nowhere"], "nowhere holds no sweep"),
        (["run", "nowhere"], "nowhere holds no sweep"),
        (["make", "nowhere", "job.toml", "--vary", "lr"], "must be section.key=value,value"),
        (
            ["make", "nowhere", "job.toml", "--vary", "a.b=1", "--vary", "a.b=2"],
            "a.b is given twice",
        ),
        (["make", "nowhere", "no.toml", "--vary", "optimizer.lr=1"], "No such file"),
        (
            ["make", "nowhere", "no.toml"],
            "--vary is missing: give at least one --vary section.key=value,value",
        ),
        (
            ["make", "nowhere", "a.toml", "--vary", "a.b=1", "--job.config_file=b.toml"],
            "the job is a.toml already; remove this argument",
        ),
        (["table", "nowhere", "--training.steps=1"], "only `tst sweep make` accepts arguments"),
    ],
)
def test_sweep_of_bad_input(tst, args, message):
    result = tst("sweep", *args)
    assert result.code == 2
    assert message in result.stderr
