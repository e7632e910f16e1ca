"""scripts/plan.py, scripts/diff_configs.py and scripts/sweep.py as a user runs them."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tomli

import sweep
from jobs import ROOT
from torchtitan.experiments.tst.job_config import SuperpositionConfigManager

PAPER = "train_configs/paper"
BAG_SIZE, STEP_RATIO = "superposition.bag_size", "superposition.step_ratio"


def test_plan(run_script, tmp_path):
    plot = tmp_path / "plan.png"
    job = f"--job.config_file={PAPER}/270M-20k-tst.toml"
    result = run_script("plan", "--no-memory", "--plot", plot, job)
    assert result.code == 0, result.stderr
    rows = {
        line[:22].strip(): line[22:].split()
        for line in result.stdout.splitlines()
        if line[:2] == "  "
    }
    assert rows["steps"] == ["6,000", "14,000", "20,000"]
    assert rows["data tokens"] == ["75.50B", "29.36B", "104.86B"]
    assert rows["data tokens a step"] == ["12,582,912", "2,097,152"]
    assert rows["FLOPs a step"][0] == rows["FLOPs a step"][1]
    assert rows["B200 hours"][2] == "34.0"
    assert "1,024 sequences = 8 ranks x 16 x 8 micro-batches" in result.stdout
    assert "./data/dclm-llama3" in result.stdout and "no such folder" in result.stdout
    assert "s from 3 to 8, r from 0.2 to 0.4" in result.stdout
    assert "3.1423" in result.stdout  # r = 0.3, s = 6
    assert plot.stat().st_size > 10_000


def test_plan_of_another_machine(run_script, tokens):
    args = [
        "--gpu",
        "H100",
        "--gpus",
        16,
        "--mfu",
        0.5,
        "--job.config_file=train_configs/demo/tst.toml",
    ]
    args += ["--training.local_batch_size=2", f"--training.dataset_path={tokens}"]
    result = run_script("plan", *args)
    assert result.code == 0, result.stderr
    assert "on 16 H100 at 50 % MFU (given)" in result.stdout
    assert re.search(r"Memory: 0\.\d GB of 80 GB on each GPU", result.stdout)
    assert re.search(
        r"Data: 23,539,200 tokens of .*, which has [\d,]+: [\d.]+ epochs, NOT", result.stdout
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--mfu", "0"], "--mfu 0.0: must be in (0, 1]"),
        (["--gpus", "-8"], "invalid positive value: '-8'"),
        (["--parallelism.data_parallel_replicate_degree=0"], "must be an integer of at least 1"),
        (["--job.config_file=none.toml"], "none.toml"),
        (["--gpus", "7"], "parallelism.data_parallel_shard_degree = 8"),
        (["--superposition.bag_size=0"], "superposition.bag_size = 0"),
    ],
)
def test_plan_of_bad_input(run_script, args, message):
    result = run_script("plan", *args, f"--job.config_file={PAPER}/270M-20k-tst.toml")
    assert result.code != 0
    assert message in result.stderr


def test_diff(run_script):
    jobs = [f"{PAPER}/270M-20k-baseline.toml", f"{PAPER}/270M-20k-tst.toml"]
    result = run_script("diff_configs", *jobs)
    assert result.code == 0, result.stderr
    assert "- superposition.bag_size = 1\n+ superposition.bag_size = 6\n" in result.stdout
    assert "optimizer" not in result.stdout and "all of them allowed" in result.stdout
    result = run_script("diff_configs", jobs[0], "--optimizer.lr=1e-3", "--", jobs[1])
    assert result.code == 1
    assert "- optimizer.lr = 0.001   <- not allowed to differ" in result.stdout
    assert "1 of 5 differences" in result.stderr
    result = run_script(
        "diff_configs", "--allow", "optimizer.lr", jobs[0], "--optimizer.lr=1", "--", jobs[0]
    )
    assert result.code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["one.toml"], "give two TOML files"),
        (["no.toml", "none.toml"], "job.config_file = 'no.toml': No such file or directory"),
        (["--", "none.toml"], "a job begins with its TOML file"),
    ],
)
def test_diff_of_bad_input(run_script, args, message):
    result = run_script("diff_configs", *args)
    assert result.code != 0
    assert message in result.stderr


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
    return sweep.make(tmp_path / "sweep", job, dict(map(sweep.parse_vary, vary)), [])


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


def test_the_command_of_a_sweep_can_be_pasted(tmp_path, job, run_script, monkeypatch):
    monkeypatch.setattr(sweep, "ROOT", ROOT / "the repository")
    result = run_script("sweep", "make", tmp_path / "my sweep", job, "--vary", f"{BAG_SIZE}=2,4")
    assert shlex.split(result.stdout.splitlines()[-1]) == [
        f"CONFIG_FILE={tmp_path / 'my sweep'}",
        *("sbatch", "--array=0-1", "the repository/scripts/slurm/train.sbatch"),
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
    with pytest.raises(ValueError, match=r"holds another sweep \(0.toml\)"):
        make(tmp_path, job, f"{BAG_SIZE}=2,4")
    assert (tmp_path / "sweep" / "0.toml").read_text() == before


def test_the_papers_own_sweep_beside_the_papers_losses(tmp_path, monkeypatch):
    """Of the model, length and weighting of the paper's table, its baseline first."""
    monkeypatch.chdir(ROOT)
    job = f"{PAPER}/ablations/600M-20k-power-law.toml"
    points = make(tmp_path, job, f"{BAG_SIZE}=1,6", f"{STEP_RATIO}=0.3")
    drawn = []
    monkeypatch.setattr(
        "plot_surface.draw_surfaces", lambda surfaces, output: drawn.append(surfaces)
    )
    write_metrics(tmp_path / "sweep" / "runs" / points[0].name, 20_000, 3.0)
    sweep.table(tmp_path / "sweep")
    assert not drawn, "a baseline alone is no plot"
    write_metrics(tmp_path / "sweep" / "runs" / points[1].name, 20_000, 2.9)
    sweep.table(tmp_path / "sweep")
    (own, of_paper) = drawn[0].values()
    assert (own.baseline, own.losses) == (3.0, {(0.3, 6): 2.9})
    assert (of_paper.model, of_paper.weighting) == ("600M", "power_law")
    assert own.parameters == of_paper.parameters


def test_a_run_is_finished_at_the_last_step_that_is_logged(tmp_path, job):
    (point,) = sweep.make(
        tmp_path / "sweep", job, {BAG_SIZE: ["4"]}, ["--training.steps=49", "--metrics.log_freq=10"]
    )
    for step, finished in ((39, False), (40, True)):
        folder = tmp_path / "sweep" / "runs" / point.name
        shutil.rmtree(folder, ignore_errors=True)
        write_metrics(folder, step, 3.0)
        (result,) = sweep.results(tmp_path / "sweep")
        assert result.finished == finished


LAUNCHER = """\
#!/usr/bin/env bash
number=$(basename "$CONFIG_FILE" .toml)
echo "run $number" | tee -a "$(dirname "$0")/launched"
[[ $number != "$FAILS" ]] || exit 3
sleep "${SLEEP:-0}"
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_of_a_sweep_that_are_not_finished(tmp_path, job, run_script, monkeypatch, jobs):
    points = make(tmp_path, job, "optimizer.lr=1e-3,2e-3,3e-3,4e-3")
    folder, launched = tmp_path / "sweep", tmp_path / "launched"
    write_metrics(folder / "runs" / points[1].name, 10, 3.0)
    launcher = tmp_path / "run_train.sh"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setenv("FAILS", "none")
    result = run_script("sweep", "run", folder, "--jobs", jobs)
    assert result.code == 0, result.stderr
    assert sorted(launched.read_text().splitlines()) == ["run 0", "run 2", "run 3"]
    assert "1 of 4 runs are finished" in result.stdout
    assert "[4/4] lr=0.004: 0:00:0" in result.stdout
    if jobs > 1:
        assert (folder / "3.log").read_text() == "run 3\n"

    monkeypatch.setenv("FAILS", "0")
    monkeypatch.setenv("SLEEP", "2")  # of the other one at work, while the first fails
    launched.unlink()
    result = run_script("sweep", "run", folder, "--jobs", jobs)
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
def test_a_table_and_a_plot_of_what_is_there(tmp_path, job, vary, capsys):
    folder = tmp_path / "sweep"
    points = make(tmp_path, job, *vary)
    for number, (point, step) in enumerate(zip(points, (10, 10, 6), strict=True)):
        write_metrics(folder / "runs" / point.name, step, 3.0 - number, 2.5 - number)
    sweep.table(folder)
    assert "2 of 3 runs finished" in capsys.readouterr().out
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
            "a key is given twice",
        ),
        (["make", "nowhere", "no.toml", "--vary", "optimizer.lr=1"], "No such file"),
    ],
)
def test_sweep_of_bad_input(run_script, args, message):
    result = run_script("sweep", *args)
    assert result.code != 0
    assert message in result.stderr
