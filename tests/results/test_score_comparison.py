"""Downstream scores at equal FLOPs, on hand-written runs whose answers can be worked out."""

import json
import math

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from torchtitan.experiments.tst.metrics_file import METRICS_FILE
from torchtitan.experiments.tst.results.comparison import compare
from torchtitan.experiments.tst.results.curves import read_curves, read_runs
from torchtitan.experiments.tst.results.report import write_comparison
from torchtitan.experiments.tst.results.score_comparison import compare_scores
from torchtitan.experiments.tst.results.scores import EVALUATIONS_FILE, Evaluation, Score
from torchtitan.experiments.tst.results.tables import rows_of_scores

FLOPS_OF_A_STEP = 1000
BOUNDARY = 20


@pytest.fixture
def write(tmp_path):
    """Write a run of 100 latents a step, and the scores of its checkpoints."""

    def write_run(name, *evaluations, steps=100, planned=None, boundary=0):
        lines = []
        for step in sorted({1, 10, boundary or 10, steps}):
            line = {"step": step, "loss_metrics/global_avg_loss": 6 - step / 50}
            line |= {"n_tokens_seen": 100 * (step + 3 * min(step, boundary))}
            line |= {"n_latents_seen": 100 * step, "time_metrics/end_to_end(s)": 36.0}
            line |= {"tflops": 10e-12, "throughput(tps)": 1.0}  # 10 FLOPs for each latent
            if boundary:
                bag_size = 4 if step <= boundary else 1
                line |= {"superposition": int(bag_size > 1), "bag_size": bag_size}
            lines.append(line)
            lines.append({"step": step, "validation_metrics/loss": 6 - step / 40})
        folder = tmp_path / name
        folder.mkdir()
        (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        if planned:
            (folder / "config.toml").write_text(f"[training]\nsteps = {planned}\n")
        if evaluations:
            of_file = [json.dumps(evaluation.to_line()) + "\n" for evaluation in evaluations]
            (folder / EVALUATIONS_FILE).write_text("".join(of_file))
        return folder

    return write_run


def scored(step, value, error=1.0, task="piqa", documents=1838, metric="acc_norm"):
    score = Score(value, error)
    return Evaluation(step, task, metric, score, documents, None, None, None, f"{step}")


def the_pair(*folders):
    (pair,) = compare_scores(read_runs(folders))
    return pair


def test_runs_that_end_together(write):
    """The last scores as they are, also where the ends differ by rounding."""
    tst = write("tst", scored(50, 40), scored(200, 55, 3), steps=200, boundary=BOUNDARY)
    baseline = write("baseline", scored(199, 50, 4), steps=199)
    pair = the_pair(tst, baseline)
    assert (pair.run, pair.baseline, pair.skipped) == ("tst", "baseline", [])
    (equal,) = pair.equal_flops
    assert (equal.task, equal.metric, equal.documents) == ("piqa", "acc_norm", 1838)
    assert equal.at == pytest.approx(199 * FLOPS_OF_A_STEP)
    assert (equal.run.score, equal.run.steps) == (Score(55, 3), (200,))
    assert (equal.baseline.score, equal.baseline.steps) == (Score(50, 4), (199,))
    assert equal.difference == Score(5, 5)
    assert equal.ended and not equal.difference.is_within_error


@pytest.mark.parametrize(("planned", "ended"), [(100, True), (None, False), (300, False)])
def test_scores_in_the_middle_of_a_schedule(write, planned, ended):
    """Both were scored up to step 100 of 120; without a config, the metrics tell the end."""
    tst = write("tst", scored(100, 55), steps=120, planned=planned, boundary=BOUNDARY)
    (equal,) = the_pair(tst, write("baseline", scored(100, 50), planned=100)).equal_flops
    assert (equal.difference.value, equal.ended) == (5, ended)


@pytest.mark.parametrize("shorter", ["tst", "baseline"])
def test_interpolation_between_checkpoints(write, shorter):
    """At step 70: three quarters of the way from step 40 to step 80."""
    short, long = [scored(30, 10), scored(70, 47, 2)], [scored(40, 40, 1), scored(80, 44, 3)]
    of_tst, of_baseline = (short, long) if shorter == "tst" else (long, short)
    tst = write("tst", *of_tst, boundary=BOUNDARY)
    (equal,) = the_pair(tst, write("baseline", *of_baseline)).equal_flops
    assert equal.at == pytest.approx(70 * FLOPS_OF_A_STEP) and not equal.ended
    own, other = equal.run, equal.baseline
    if shorter == "baseline":
        own, other = other, own
    assert (own.score, own.steps) == (Score(47, 2), (70,))
    assert other.steps == (40, 80)
    assert other.score.value == pytest.approx(40 + 0.75 * 4)
    assert other.score.error == pytest.approx(1 + 0.75 * 2)
    assert equal.difference.value == pytest.approx(4 if shorter == "tst" else -4)
    assert equal.difference.error == pytest.approx(math.hypot(2, 2.5))


def test_a_score_without_an_error(write):
    tst = write("tst", scored(70, 47), boundary=BOUNDARY)
    (equal,) = the_pair(tst, write("b", scored(40, 40, None), scored(80, 44))).equal_flops
    assert (equal.baseline.score.error, equal.difference.error) == (None, None)
    assert rows_of_scores(compare_scores(read_runs([tst, tst.parent / "b"])))[1][6:8] == [
        "43.0",
        "+4.0",
    ]


def test_nothing_is_extrapolated(write):
    tst = write("tst", scored(50, 40), boundary=BOUNDARY)
    baseline = write("baseline", scored(80, 45), scored(100, 46))
    (equal,) = the_pair(tst, baseline).equal_flops
    assert (equal.run.steps, equal.baseline, equal.difference) == ((50,), None, None)
    rows = rows_of_scores([the_pair(tst, baseline)])
    cells = ["tst against baseline", "piqa", "5.000e+04", "50", "40.0 ± 1.0", "-", "-", "-", "no"]
    assert rows[1] == cells


def test_other_documents_or_metrics_are_not_compared(write):
    tst = [scored(100, 55, task="arc_easy", documents=100), scored(100, 60, task="boolq")]
    tst += [scored(100, 30), scored(100, 30, task="mmlu")]
    baseline = [scored(100, 50, task="arc_easy", documents=2376), scored(100, 29)]
    baseline += [scored(100, 60, task="boolq", metric="acc")]
    pair = the_pair(write("tst", *tst, boundary=BOUNDARY), write("baseline", *baseline))
    assert [equal.task for equal in pair.equal_flops] == ["piqa"]
    same = "Scores are compared on the same number of documents and with the same metric"
    assert pair.skipped == [
        "arc_easy of tst and baseline is skipped: tst has acc_norm on 100 documents, baseline "
        f"acc_norm on 2,376 documents. {same}",
        "boolq of tst and baseline is skipped: tst has acc_norm on 1,838 documents, baseline "
        f"acc on 1,838 documents. {same}",
    ]


def test_a_limit_that_has_changed(write):
    """The most documents on which both have a score at equal FLOPs."""
    few = {"documents": 100}
    tst = write("tst", scored(50, 40, **few), scored(100, 55), boundary=BOUNDARY)
    baseline = write("baseline", scored(50, 39, **few), scored(100, 50))
    (equal,) = the_pair(tst, baseline).equal_flops
    assert (equal.documents, equal.difference.value) == (1838, 5)
    later = write("later", scored(40, 38, **few), scored(50, 39, **few), scored(60, 41))
    baseline = write("b", scored(50, 41, **few), scored(90, 50), scored(100, 50))
    (equal,) = compare_scores(read_runs([tst, later]))[0].equal_flops
    assert (equal.documents, equal.difference.value) == (100, 1)


def test_a_run_with_tensorboards_files(write):
    """Scores are read from the run folder, whichever file has the metrics."""
    folder = write("tst", scored(50, 40), boundary=BOUNDARY)
    lines = [json.loads(line) for line in (folder / METRICS_FILE).open()]
    with SummaryWriter(str(folder / "tb/launch")) as writer:
        for line in lines:
            for tag in line.keys() - {"step"}:
                writer.add_scalar(tag, line[tag], line["step"])
    (folder / METRICS_FILE).unlink()
    (found,) = read_curves(folder).scores
    assert (found.evaluation, found.at.step) == (scored(50, 40), 50)
    assert found.at.flops == pytest.approx(50 * FLOPS_OF_A_STEP)


def test_every_pair_and_task_in_order(write):
    """The tasks of Table 3 in its order, then others; a pair without scores has no rows."""
    tasks = ("zzz", "piqa", "aaa", "hellaswag")
    tst = write("tst", *(scored(100, 50, task=task) for task in tasks), boundary=BOUNDARY)
    other = write("other", scored(100, 51), boundary=BOUNDARY)
    baseline = write("baseline", *(scored(100, 49, task=task) for task in tasks))
    runs = read_runs([tst, other, baseline, write("without")])
    pairs = compare_scores(runs)
    for pair, of_losses in zip(pairs, compare(runs).pairs, strict=True):
        assert (pair.run, pair.baseline) == (of_losses.run, of_losses.baseline)
    assert [(row[0], row[1]) for row in rows_of_scores(pairs)[1:]] == [
        ("tst against baseline", "hellaswag"),
        ("", "piqa"),
        ("", "aaa"),
        ("", "zzz"),
        ("other against baseline", "piqa"),
    ]
    assert rows_of_scores([pairs[1]]) == []


@pytest.fixture
def two_runs(write):
    """One task is level within the error, one is ahead, and one cannot be compared."""
    tst = [scored(10, 50), scored(50, 52), scored(100, 54.25)]
    tst += [scored(100, 40, task="boolq"), scored(100, 30, task="mmlu", documents=10)]
    baseline = [scored(50, 51), scored(100, 53.5)]
    baseline += [scored(100, 37, task="boolq"), scored(100, 30, task="mmlu")]
    return [write("tst", *tst, boundary=BOUNDARY), write("baseline", *baseline)]


def test_console(two_runs, tst, tmp_path):
    result = tst("compare", *two_runs, "--output", tmp_path / "out")
    assert result.code == 0, result.stderr
    losses, scores, equal_loss = (
        result.stdout.index(f"\n{title}:\n")
        for title in ("At equal FLOPs", "Scores at equal FLOPs", "At equal loss")
    )
    assert losses < scores < equal_loss
    _, head, boolq, piqa, skipped = result.stdout[scores:equal_loss].strip().split("\n")[-5:]
    words = (
        "task FLOPs step score (%) baseline's step baseline's score (%) difference both end there"
    )
    assert " ".join(head.split()) == words
    assert " ".join(boolq.split()) == (
        "tst against baseline boolq 1.000e+05 100 40.0 ± 1.0 100 37.0 ± 1.0 +3.0 ± 1.4 yes"
    )
    assert " ".join(piqa.split()) == (
        "piqa 1.000e+05 100 54.2 ± 1.0 100 53.5 ± 1.0 +0.8 ± 1.4 (within error) yes"
    )
    assert len(boolq) == len(piqa), "aligned"
    assert skipped.startswith("mmlu of tst and baseline is skipped")
    assert "scores.png" in result.stdout


def test_report_and_numbers(two_runs, tmp_path):
    runs = read_runs(two_runs)
    report, *plots = write_comparison(runs, compare(runs), tmp_path / "out", "tst compare")
    assert [plot.name for plot in plots] == ["loss.png", "scores.png"]
    page = report.read_text()
    sections = ["At equal FLOPs", "Scores at equal FLOPs", "At equal loss", "How it is counted"]
    places = [page.index(f"<h2>{section}</h2>") for section in sections]
    assert places == sorted(places)
    of_scores = page[places[1] : places[2]]
    for text in (
        "<td>+0.8 ± 1.4 (within error)</td>",
        "mmlu of tst and baseline is skipped",
        '<img alt="Scores',
    ):
        assert text in of_scores
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (pair,) = content["pairs"]
    _, piqa = pair["scores"]["equal_flops"]
    assert piqa == {
        "task": "piqa",
        "metric": "acc_norm",
        "documents": 1838,
        "at": pytest.approx(100 * FLOPS_OF_A_STEP),
        "run": {"score": {"value": 54.25, "error": 1.0}, "steps": [100]},
        "baseline": {"score": {"value": 53.5, "error": 1.0}, "steps": [100]},
        "ended": True,
        "difference": {"value": 0.75, "error": math.sqrt(2)},
        "within_error": True,
    }
    assert [reason[:4] for reason in pair["scores"]["skipped"]] == ["mmlu"]
    of_tst, of_baseline = (run["scores"] for run in content["runs"])
    assert (len(of_tst), len(of_baseline)) == (5, 4)
    assert of_tst[0] == {
        "step": 10,
        "task": "piqa",
        "metric": "acc_norm",
        "documents": 1838,
        "score": {"value": 50, "error": 1.0},
        "flops": pytest.approx(10 * FLOPS_OF_A_STEP),
    }


def test_plot(two_runs, tmp_path, monkeypatch):
    """A panel for each task: scores with errors, a gap at the boundary, and a line there."""
    figures, lines = [], []
    save = Figure.savefig

    def savefig(figure, output, **settings):
        figures.append(figure)
        save(figure, output, **settings)

    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.setattr(Axes, "axvline", lambda panel, x, **style: lines.append((x, style)))
    runs = read_runs(two_runs)
    write_comparison(runs, compare(runs), tmp_path / "out", "tst compare")
    of_scores = figures[0]
    assert [panel.get_title() for panel in of_scores.axes] == [
        "mmlu (acc_norm, 10 or 1,838 documents)",
        "boolq (acc_norm, 1,838 documents)",
        "piqa (acc_norm, 1,838 documents)",
    ]
    drawn = [bars.lines[0].get_xydata().tolist() for bars in of_scores.axes[2].containers]
    assert drawn == [
        [[pytest.approx(50e3), 52], [pytest.approx(100e3), 54.25]],
        [[pytest.approx(10e3), 50]],
        [[pytest.approx(50e3), 51], [pytest.approx(100e3), 53.5]],
    ]
    (error_bars,) = of_scores.axes[2].containers[0].lines[2]
    assert error_bars.get_segments()[1][:, 1].tolist() == [53.25, 55.25]
    assert [text.get_text() for text in of_scores.legends[0].get_texts()] == ["tst", "baseline"]
    boundaries = [(x, style["linestyle"]) for x, style in lines[:3]]
    assert boundaries == [(pytest.approx(BOUNDARY * FLOPS_OF_A_STEP), "--")] * 3


def test_one_run(write, tst):
    folder = write("tst", scored(50, 52), scored(100, 54), boundary=BOUNDARY)
    result = tst("compare", folder)
    assert result.code == 0, result.stderr
    assert "Scores at" not in result.stdout and "scores.png" in result.stdout
    page = (folder / "report.html").read_text()
    assert "<h2>Scores</h2>" in page and page.count("<img") == 2
    (run,) = json.loads((folder / "comparison.json").read_text())["runs"]
    assert [scores["score"]["value"] for scores in run["scores"]] == [52, 54]


def test_runs_without_scores(write, tst, tmp_path):
    folders = [write("tst", boundary=BOUNDARY), write("baseline")]
    output = tmp_path / "out"
    result = tst("compare", *folders, "--output", output)
    assert result.code == 0, result.stderr
    assert "Scores" not in result.stdout and not (output / "scores.png").exists()
    assert "<h2>Scores" not in (output / "report.html").read_text()
