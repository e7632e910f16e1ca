"""``tst sweep table --evaluate``: the scores of a sweep's runs next to the paper's."""

import csv
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest

from jobs import STEPS
from tasks import write_task
from torchtitan.experiments.tst import paper
from torchtitan.experiments.tst.planning import sweep as planning
from torchtitan.experiments.tst.results import sweep_plots, sweep_scores
from torchtitan.experiments.tst.results.scores import EVALUATIONS_FILE, Evaluation, Score
from torchtitan.experiments.tst.results.sweep_score_tables import WITHIN_ERROR

BAG_SIZE, STEP_RATIO = "superposition.bag_size", "superposition.step_ratio"
GRID = (f"{BAG_SIZE}=1,4,6", f"{STEP_RATIO}=0.3,0.55")  # a baseline, and two by two
STEPS_OF_PAPER = 20_000


@pytest.fixture
def sweep(tmp_path):
    """Make a sweep of the paper's 270M, with metrics at a step of each run."""

    def make(*vary: str, steps: list[int] | None = None) -> list[Path]:
        job = tmp_path / "job.toml"
        job.write_text(
            f"""
[superposition]
bag_size = 4
step_ratio = 0.3
[model]
name = "llama3"
flavor = "270M"
[training]
steps = {STEPS_OF_PAPER}
local_batch_size = 4
"""
        )
        points = planning.make(tmp_path / "sweep", str(job), planning.parse_vary(vary), [])
        folders = [Path(point.toml["job"]["dump_folder"]) for point in points]
        for folder, step in zip(folders, steps or [STEPS_OF_PAPER] * len(points), strict=True):
            folder.mkdir(parents=True)
            line = {"step": step, "loss_metrics/global_avg_loss": 3.0}
            (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return folders

    return make


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    from torchtitan.experiments.tst.planning import surface_plots

    drawn = []
    monkeypatch.setattr(surface_plots.plt, "close", drawn.append)
    return drawn


@pytest.fixture
def no_harness(monkeypatch):
    """Fails where the harness is imported."""
    for name in ("harness", "run_evaluation"):
        module = f"torchtitan.experiments.tst.results.{name}"
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setitem(sys.modules, module, None)


def score(run: Path, scores: dict[str, float | tuple[float, float]], **others) -> None:
    """Write scores of a run, with an error of 1 if none is given."""
    with (run / EVALUATIONS_FILE).open("a") as file:
        for task, of_task in scores.items():
            value, error = of_task if isinstance(of_task, tuple) else (of_task, 1.0)
            settings = {"step": STEPS_OF_PAPER, "limit": None, "checkpoint": "x"} | others
            evaluation = Evaluation(
                task=task,
                metric="acc",
                score=Score(value, error),
                documents=settings["limit"] or 100,
                data_tokens=None,
                latents=None,
                **settings,
            )
            file.write(json.dumps(evaluation.to_line()) + "\n")


def cells(line: str) -> list[str]:
    """The cells of a line of a table."""
    return re.split(r"  +", line.strip())


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def table(tst, folder: Path, *options: object) -> list[str]:
    result = tst("sweep", "table", folder, "--evaluate", *options)
    assert result.code == 0, result.stderr
    return result.stdout.splitlines()


def test_a_table_over_r_and_s_beside_the_papers(sweep, tst, tmp_path, no_harness):
    runs = sweep(*GRID)  # (0.3, 4), (0.55, 4), (0.3, 6), (0.55, 6) after the baseline
    for run, piqa in zip(runs, (66.0, 68.0, 65.0, 67.0, 60.0), strict=True):
        score(run, {"piqa": piqa})
    lines = table(tst, tmp_path / "sweep", "--tasks", "piqa")
    start = lines.index("piqa, score (%) ± standard error; paper: 270M, 20,000 steps, uniform")
    assert [cells(line) for line in lines[start + 1 : start + 11]] == [
        ["r", "s = 4", "s = 6"],
        ["0.3", "score", "68.0 ± 1.0", "67.0 ± 1.0"],
        ["over the baseline", "+2.0 ± 1.4", "+1.0 ± 1.4 (within error)"],
        ["paper's score", "66.7", "67.0"],
        ["over its baseline", "+0.3", "+0.7"],
        ["0.55", "score", "65.0 ± 1.0", "60.0 ± 1.0"],
        ["over the baseline", "-1.0 ± 1.4 (within error)", "-6.0 ± 1.4"],
        ["paper's score", "-", "-"],
        ["over its baseline", "-", "-"],
        ["baseline: this sweep's 66.0 ± 1.0, the paper's 66.4"],
    ]
    assert rows_of(tmp_path / "sweep" / "scores_piqa.csv") == [
        ["quantity", "r", "1", "4", "6"],
        ["score(%)", "0.0", "66.0", "", ""],
        ["score(%)", "0.3", "", "68.0", "67.0"],
        ["score(%)", "0.55", "", "65.0", "60.0"],
        ["standard_error(%)", "0.0", "1.0", "", ""],
        ["standard_error(%)", "0.3", "", "1.0", "1.0"],
        ["standard_error(%)", "0.55", "", "1.0", "1.0"],
        ["paper(%)", "0.0", "66.38", "", ""],
        ["paper(%)", "0.3", "", "66.65", "67.03"],
        ["paper(%)", "0.55", "", "", ""],
    ]


def test_ranks_of_the_runs_and_of_the_papers(sweep, tst, tmp_path, no_harness):
    runs = sweep(*GRID)
    boolq, piqa = (57.0, 57.0, 60.0, 50.0, 40.0), (66.0, 68.0, 64.0, 67.0, 65.0)
    for run, *scores in zip(runs, boolq, piqa, strict=True):
        score(run, dict(zip(("boolq", "piqa"), scores, strict=True)))
    lines = table(tst, tmp_path / "sweep", "--tasks", "boolq,piqa")
    start = next(n for n, line in enumerate(lines) if cells(line)[-1] == "paper's average rank")
    assert cells(lines[start]) == ["run", "boolq", "piqa", "average rank", "paper's average rank"]
    # ranks on boolq 2.5, 2.5, 1, 4, 5, and on piqa 3, 1, 5, 2, 4; of the paper's three runs on
    # boolq (56.67, 53.42, 53.98) 1, 3, 2, and on piqa (66.38, 66.65, 67.03) 3, 2, 1
    near = WITHIN_ERROR
    assert [cells(line) for line in lines[start + 1 : start + 6]] == [
        ["baseline", "57.0 ± 1.0", "66.0 ± 1.0", "2.75", "2.00"],
        ["bag_size=4,step_ratio=0.3", f"57.0 ± 1.0 {near}", "68.0 ± 1.0", "1.75", "2.50"],
        ["bag_size=4,step_ratio=0.55", "60.0 ± 1.0", "64.0 ± 1.0", "3.00", "-"],
        ["bag_size=6,step_ratio=0.3", "50.0 ± 1.0", f"67.0 ± 1.0 {near}", "3.00", "1.50"],
        ["bag_size=6,step_ratio=0.55", "40.0 ± 1.0", f"65.0 ± 1.0 {near}", "4.50", "-"],
    ]
    assert "The paper's ranks are among the 3 runs that it has here, on its tasks" in lines
    head, *rows = rows_of(tmp_path / "sweep" / "scores.csv")
    assert head == [
        *("run", BAG_SIZE, STEP_RATIO, "boolq(%)", "boolq_error(%)", "piqa(%)", "piqa_error(%)"),
        *("average_rank", "paper_average_rank"),
    ]
    assert rows[0] == ["0", "", "", "57.0", "1.0", "66.0", "1.0", "2.75", "2.0"]
    assert rows[2] == ["2", "4", "0.55", "60.0", "1.0", "64.0", "1.0", "3.0", ""]


def test_the_plot_has_the_errors_and_the_papers_runs(sweep, tst, tmp_path, figures, no_harness):
    for run, value in zip(sweep(*GRID), (37.0, 39.0, 36.0, 40.0, 35.0), strict=True):
        score(run, {"hellaswag": (value, 0.5)})
    table(tst, tmp_path / "sweep", "--tasks", "hellaswag")
    assert (tmp_path / "sweep" / "scores_hellaswag.png").stat().st_size > 10_000
    _, figure = figures  # after the losses
    own, of_paper = figure.axes
    assert own.get_title() == "this sweep, hellaswag: 270M, 20,000 steps, uniform"
    assert own.get_ylabel() == of_paper.get_ylabel() == "score (%)"
    lines = {line.get_label(): line for line in own.containers}
    assert list(lines) == ["r = 0.3", "r = 0.55"]
    assert lines["r = 0.3"][0].get_xydata().tolist() == [[4, 39], [6, 40]]
    (bars,) = lines["r = 0.3"][2]
    assert [bar.tolist() for bar in bars.get_segments()] == [
        [[4, 38.5], [4, 39.5]],
        [[6, 39.5], [6, 40.5]],
    ]
    (band,) = own.patches
    assert (band.get_y(), band.get_height()) == (36.5, 1.0)
    surface = paper.nearest_surface(1, STEPS_OF_PAPER, "uniform", "hellaswag")
    (line,) = (line for line in of_paper.containers if line.get_label() == "r = 0.3")
    points = [[s, surface.values[0.3, s]] for s in range(2, 17)]
    assert line[0].get_xydata().tolist() == points and not line[2]
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[0] == "baseline" and len(names) == len(set(names)) == 1 + 10 + 1


def test_a_task_that_the_paper_lacks(sweep, tst, tmp_path, figures, no_harness):
    for run, value in zip(sweep(*GRID), (37.0, 39.0, 36.0, 40.0, 35.0), strict=True):
        score(run, {"sciq": value, "piqa": value})
    lines = table(tst, tmp_path / "sweep", "--tasks", "sciq,piqa")
    start = lines.index("sciq, score (%) ± standard error; not in the paper")
    assert cells(lines[start + 4])[:2] == ["0.55", "score"]
    assert "baseline: this sweep's 37.0 ± 1.0" in lines
    assert "The paper's ranks are among the 3 runs that it has here, on its tasks" in lines
    rows = rows_of(tmp_path / "sweep" / "scores_sciq.csv")
    assert {row[0] for row in rows} == {"quantity", "score(%)", "standard_error(%)"}
    assert [len(figure.axes) for figure in figures] == [2, 1, 2]


def test_a_sweep_over_other_keys(sweep, tst, tmp_path, figures, no_harness):
    """Each run is compared with the baseline of its own learning rate."""
    runs = sweep("optimizer.lr=1e-3,2e-3", f"{BAG_SIZE}=1,4")
    for run, value in zip(runs, (30.0, 35.0, 40.0, 40.5), strict=True):
        score(run, {"piqa": value})
    lines = table(tst, tmp_path / "sweep", "--tasks", "piqa")
    start = next(n for n, line in enumerate(lines) if cells(line)[-1] == "average rank")
    assert [cells(line) for line in lines[start + 1 : start + 5]] == [
        ["baseline,lr=0.001", "30.0 ± 1.0", "4.00"],
        ["lr=0.001,bag_size=4", "35.0 ± 1.0", "3.00"],
        ["baseline,lr=0.002", "40.0 ± 1.0", "2.00"],
        ["lr=0.002,bag_size=4", f"40.5 ± 1.0 {WITHIN_ERROR}", "1.00"],
    ]
    assert not any("paper's" in line for line in lines)
    assert not (tmp_path / "sweep" / "scores_piqa.csv").exists()
    (axes,) = figures[-1].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer.lr", "piqa score (%)")
    lines = {line.get_label(): line for line in axes.containers}
    assert lines["baseline"][0].get_xydata().tolist() == [[0.001, 30], [0.002, 40]]
    assert lines[f"{BAG_SIZE} = 4"][0].get_xydata().tolist() == [[0.001, 35], [0.002, 40.5]]
    (bars,) = lines["baseline"][2]
    assert bars.get_segments()[0].tolist() == [[0.001, 29], [0.001, 31]]


def test_scores_without_an_error(sweep, tst, tmp_path, no_harness):
    for run, value in zip(sweep(f"{BAG_SIZE}=1,4", f"{STEP_RATIO}=0.3"), (66.0, 66.0), strict=True):
        score(run, {"piqa": (value, None)})
    lines = table(tst, tmp_path / "sweep", "--tasks", "piqa")
    assert ["over the baseline", "+0.0"] in map(cells, lines)
    assert not any("within error" in line or WITHIN_ERROR in line for line in lines)


def test_unfinished_runs_are_left_out_and_counted(sweep, tst, tmp_path, no_harness):
    runs = sweep(*GRID, steps=[STEPS_OF_PAPER, STEPS_OF_PAPER, 19_000, 10, 19_999])
    for run in runs[:3]:
        score(run, {"piqa": 66.0})
    lines = table(tst, tmp_path / "sweep", "--tasks", "piqa")
    assert (
        "2 of 5 runs are scored. Skipped: 3 not finished, 0 finished without these scores" in lines
    )
    assert len(rows_of(tmp_path / "sweep" / "scores.csv")) == 1 + 2
    assert rows_of(tmp_path / "sweep" / "scores_piqa.csv")[0] == ["quantity", "r", "1", "4"]


def test_nothing_is_finished(sweep, tst, tmp_path, no_harness):
    sweep(*GRID, steps=[1] * 5)
    lines = table(tst, tmp_path / "sweep")
    assert lines[-1].startswith("0 of 5 runs are scored. Skipped: 5 not finished")
    assert not list((tmp_path / "sweep").glob("scores*"))


def test_a_baseline_alone_is_no_plot(sweep, tst, tmp_path, no_harness):
    (first, *_) = sweep(*GRID, steps=[STEPS_OF_PAPER, 1, 1, 1, 1])
    score(first, {"piqa": 66.0})
    lines = table(tst, tmp_path / "sweep", "--tasks", "piqa")
    assert ["baseline", "66.0 ± 1.0", "1.00"] in map(cells, lines)
    assert not list((tmp_path / "sweep").glob("*.png"))


@pytest.fixture
def evaluated(monkeypatch):
    """The runs that the harness is given; each gets 50 on its tasks. Nothing is drawn."""
    from torchtitan.experiments.tst.results import run_evaluation

    given = []

    def evaluate_run(run, job_arguments, harness, say, *, last_only):
        assert (job_arguments, last_only) == ([], True)
        given.append((run.name, harness.tasks, harness.limit))
        if (run / "no checkpoint").exists():
            raise run_evaluation.CheckpointError(f"{run} has no checkpoint of step 20000")
        score(run, dict.fromkeys(harness.tasks, 50.0), limit=harness.limit)

    monkeypatch.setattr(run_evaluation, "evaluate_run", evaluate_run)
    monkeypatch.setattr(sweep_plots, "draw", lambda *args, **options: None)
    return given


def test_only_what_is_missing_is_scored(sweep, tst, tmp_path, evaluated):
    first, second = sweep(f"{BAG_SIZE}=1,4", f"{STEP_RATIO}=0.3")
    for task in sweep_scores.TASKS:
        score(first, {task: 60.0})
    score(second, {"piqa": 60.0})
    score(second, dict.fromkeys(sweep_scores.TASKS, 10.0), step=100)
    score(second, dict.fromkeys(sweep_scores.TASKS, 10.0), limit=10)
    lines = table(tst, tmp_path / "sweep")
    assert evaluated == [(second.name, sweep_scores.TASKS, None)]
    assert sorted(sweep_scores.TASKS) == sorted(paper.SCORE_TASKS)
    assert "[1/1] bag_size=4,step_ratio=0.3" in lines
    assert any(line.startswith("2 of 2 runs are scored") for line in lines)
    table(tst, tmp_path / "sweep", "--tasks", "piqa,boolq")
    assert len(evaluated) == 1, "nothing is missing"
    lines = table(tst, tmp_path / "sweep", "--limit", 10, "--tasks", "piqa")
    assert evaluated[1:] == [(first.name, ["piqa"], 10)], "the other has these"
    assert lines[-2] == "These scores are of the first 10 documents of each task only"
    assert ["paper's score", "66.7"] in map(cells, lines)
    assert [row[3] for row in rows_of(tmp_path / "sweep" / "scores.csv")[1:]] == ["50.0", "10.0"]


def test_a_checkpoint_that_was_trained_again_is_scored_again(sweep, tst, tmp_path, evaluated):
    (run,) = sweep("superposition.weighting=uniform")
    checkpoint = run / "checkpoint" / f"step-{STEPS_OF_PAPER}"
    checkpoint.mkdir(parents=True)
    score(run, {"piqa": 60.0}, checkpoint="of the former weights")
    table(tst, tmp_path / "sweep", "--tasks", "piqa")
    assert len(evaluated) == 1
    score(run, {"piqa": 70.0}, checkpoint=sweep_scores.manifests.identity(checkpoint))
    table(tst, tmp_path / "sweep", "--tasks", "piqa")
    assert len(evaluated) == 1
    assert rows_of(tmp_path / "sweep" / "scores.csv")[1][2] == "70.0"


def test_a_run_without_its_last_checkpoint_is_left_out(sweep, tst, tmp_path, evaluated):
    runs = sweep(*GRID)
    (runs[1] / "no checkpoint").touch()
    lines = table(tst, tmp_path / "sweep", "--tasks", "piqa")
    assert len(evaluated) == 5
    (skipped,) = (line for line in lines if "is skipped" in line)
    assert skipped.startswith("bag_size=4,step_ratio=0.3 is skipped: ")
    assert (
        "4 of 5 runs are scored. Skipped: 0 not finished, 1 finished without these scores" in lines
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "3"], "--limit: works only with --evaluate. Add --evaluate"),
        (
            ["--include-path", "x", "--batch-size", "4", "--device", "cpu", "--tasks", "piqa"],
            "--tasks, --include-path, --batch-size, --device: works only with --evaluate",
        ),
        (["--evaluate", "--limit", "0"], "--limit 0: must be at least 1"),
    ],
)
def test_what_is_refused(sweep, tst, tmp_path, options, message):
    sweep(f"{BAG_SIZE}=1,4", f"{STEP_RATIO}=0.3")
    result = tst("sweep", "table", tmp_path / "sweep", *options)
    assert (result.code, message in result.stderr) == (2, True), result.stderr


def test_without_the_option_nothing_is_scored(sweep, tst, tmp_path, no_harness):
    sweep(*GRID)
    assert tst("sweep", "table", tmp_path / "sweep").code == 0
    assert not list((tmp_path / "sweep").glob("scores*"))


def test_the_surface_of_scores_and_of_losses(sweep, tmp_path):
    sweep(*GRID)
    values = {BAG_SIZE: 4, STEP_RATIO: 0.3}
    points = [sweep_plots.Point(values, 66.0, 0.5)]
    scores = sweep_plots.surface_of(tmp_path / "sweep", points, "piqa")
    assert (scores.quantity, scores.errors, scores.baseline) == ("score (%)", {(0.3, 4): 0.5}, None)
    assert sweep_plots.nearest_to(scores).task == "piqa"
    losses = sweep_plots.surface_of(tmp_path / "sweep", points)
    assert sweep_plots.nearest_to(losses) in paper.surfaces()


CODE = [
    {"question": "def read", "choices": ["(self", " the"], "answer": 0},
    {"question": "import", "choices": [" os", "):", " = 1"], "answer": 2},
    {"question": "return", "choices": [" None", " x"], "answer": 1},
]


def test_runs_are_scored_by_the_harness(whole, base_args, tmp_path, offline_harness, tst):
    """Two runs that have ended, with their checkpoints, on a small task."""
    job = tmp_path / "job.toml"
    job.write_text('[model]\nname = "llama3"\n')
    vary = planning.parse_vary(["debug.seed=0,1"])
    for point in planning.make(tmp_path / "sweep", str(job), vary, base_args):
        shutil.copytree(whole.folder, point.toml["job"]["dump_folder"], symlinks=True)
    write_task(tmp_path / "tasks", "code", CODE)
    options = ["--tasks", "code", "--include-path", tmp_path / "tasks", "--batch-size", 1]
    lines = table(tst, tmp_path / "sweep", *options, "--device", "cpu")
    head, *rows = rows_of(tmp_path / "sweep" / "scores.csv")
    assert head == ["run", "debug.seed", "code(%)", "code_error(%)", *head[-2:]]
    assert [row[:2] + row[4:] for row in rows] == [["0", "0", "1.5", ""], ["1", "1", "1.5", ""]]
    value, error = map(float, rows[0][2:4])
    assert any(value == pytest.approx(100 * n / 3) for n in range(4))
    assert error == pytest.approx(100 * math.sqrt(value / 100 * (1 - value / 100) / 2))
    assert any(line.startswith(f"step-{STEPS}: code ") for line in lines)
    assert (tmp_path / "sweep" / "scores_code.png").stat().st_size > 10_000
