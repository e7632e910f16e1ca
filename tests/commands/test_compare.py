"""``tst compare`` on real runs: every number in its report from the metrics themselves."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.axes import Axes
from torch.utils.tensorboard import SummaryWriter
from torchtitan.train import Trainer

from torchtitan.experiments.tst.core import Schedule
from torchtitan.experiments.tst.metrics_file import METRICS_FILE, TRAINING_LOSS, VALIDATION_LOSS
from torchtitan.experiments.tst.results.curves import MetricsError, read_curves

S, BOUNDARY, STEPS, LATENTS = 4, 6, 24, 4 * 32
LOG, VALIDATE = 4, 6
TRAINED = []


@pytest.fixture
def job(corpus):
    return (
        f"--training.steps={STEPS}",
        "--optimizer.lr=0.01",
        f"--metrics.log_freq={LOG}",
        "--metrics.enable_tensorboard",
        "--validation.enable",
        "--validation.dataset=jsonl",
        "--validation.steps=2",
        f"--validation.dataset_path={corpus / 'validation.jsonl'}",
        "--validation.seq_len=32",
        "--validation.local_batch_size=4",
        f"--validation.freq={VALIDATE}",
    )


@pytest.fixture
def runs(train, job, tmp_path_factory):
    """Folders of a run and its baseline, trained once for all tests."""
    if not TRAINED:
        on = (f"--superposition.bag_size={S}", f"--superposition.steps={BOUNDARY}")
        folder = tmp_path_factory.mktemp("runs")
        for name, args in (("tst", on), ("baseline", ())):
            train(*job, *args, f"--job.dump_folder={folder / name}")
        TRAINED.extend((folder / "tst", folder / "baseline"))
    return TRAINED


class Tables(HTMLParser):
    """All tables of a page: rows of cells."""

    def __init__(self, page):
        super().__init__()
        self.tables, self.cell = [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = True
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        if self.cell:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = False


def worked_out(folder):
    """The curves of a run once more, from its metrics and nothing else, another way."""
    lines = [json.loads(line) for line in (folder / METRICS_FILE).open()]
    logged = [line for line in lines if "grad_norm" in line]
    steps = np.array([line["step"] for line in logged])
    per_latent = np.array([line["tflops"] / line["throughput(tps)"] * 1e12 for line in logged])
    per_step = np.array([line["time_metrics/end_to_end(s)"] for line in logged])
    new_steps = np.diff(steps, prepend=0)
    validated = [line for line in lines if "validation_metrics/loss" in line]
    at = np.array([line["step"] for line in validated])
    flops = np.cumsum(per_latent * new_steps * LATENTS)
    hours = np.cumsum(per_step * new_steps) / 3600
    return {
        "flops": np.interp(at, [0, *steps], [0, *flops]),
        "hours": np.interp(at, [0, *steps], [0, *hours]),
        "tokens": np.array([line["n_tokens_seen"] for line in validated]),
        "steps": at,
        "loss": np.array([line["validation_metrics/loss"] for line in validated]),
        "training": {line["step"]: line["loss_metrics/global_avg_loss"] for line in logged},
        "hours in all": hours[-1],
        "flops in all": flops[-1],
    }


def first(curve, loss, axis):
    """Where the curve reaches a loss first."""
    index = int(np.argmax(curve["loss"] <= loss))
    return np.interp(
        -loss, -curve["loss"][index - 1 : index + 1], curve[axis][index - 1 : index + 1]
    )


def near(cell, value):
    """The value to the digits that are shown."""
    mantissa, _, exponent = cell.partition("e")
    digits = len(mantissa.partition(".")[2])
    return abs(float(cell) - value) <= 0.51 * 10.0 ** (int(exponent or 0) - digits)


def test_every_number_in_the_report(runs, tst, tmp_path):
    output = tmp_path / "comparison"
    result = tst("compare", *runs, "--output", output)
    assert result.code == 0, result.stderr
    tst, baseline = (worked_out(run) for run in runs)
    page = (output / "report.html").read_text()
    of_runs, flops, loss, data, config = Tables(page).tables

    bag_loss, after = (
        tst["training"][BOUNDARY],
        {step: loss for step, loss in tst["training"].items() if step > BOUNDARY},
    )
    for row, run, name in zip(of_runs[1:], (tst, baseline), ("tst", "baseline"), strict=True):
        in_superposition = name == "tst"
        assert row[0] == name
        assert row[1] == (f"{S}" if in_superposition else "1")
        assert row[2] == f"{STEPS}"
        assert row[3] == (f"{BOUNDARY}" if in_superposition else "-")
        tokens = LATENTS * (STEPS + (S - 1) * BOUNDARY * in_superposition)
        assert row[4] == f"{tokens:,}"
        assert row[5] == f"{LATENTS * STEPS:,}"
        assert near(row[6], run["flops in all"])
        assert float(row[7]) == pytest.approx(run["hours in all"], rel=0.01)
        assert near(row[8], run["loss"][-1])
    assert near(of_runs[1][9], max(after.values()) - bag_loss)
    assert of_runs[2][9:] == ["-", "-"]
    steps = [BOUNDARY, *after]
    losses = [bag_loss + 1e-9, *after.values()]
    back = next((i for i in range(1, len(steps)) if losses[i] <= bag_loss), None)
    if back == 1:
        expected = steps[1] - BOUNDARY
    elif back:
        expected = (
            np.interp(-bag_loss, [-losses[back - 1], -losses[back]], steps[back - 1 : back + 1])
            - BOUNDARY
        )
    assert of_runs[1][10] == ("never" if back is None else f"{expected:,.0f} steps")

    assert flops[1][0] == loss[1][0] == data[1][0] == "tst against baseline"
    assert near(flops[1][1], tst["flops in all"])
    assert near(flops[1][2], tst["loss"][-1]) and near(flops[1][3], baseline["loss"][-1])
    assert near(flops[1][4], baseline["loss"][-1] - tst["loss"][-1])
    assert flops[1][6] == "yes"

    higher = max(tst["loss"][-1], baseline["loss"][-1])
    at, baseline_at = first(tst, higher, "flops"), first(baseline, higher, "flops")
    assert near(loss[1][1], higher)
    assert near(loss[1][2], at) and near(loss[1][3], baseline_at)
    assert near(loss[1][4], baseline_at / at)
    assert near(loss[1][5], first(baseline, higher, "hours") / first(tst, higher, "hours"))

    tokens = LATENTS * STEPS
    of_tst = np.interp(tokens, tst["tokens"], tst["loss"])
    assert data[1][1] == f"{tokens:,}" and data[1][5] == "no"
    assert near(data[1][2], of_tst) and near(data[1][3], baseline["loss"][-1])
    assert near(data[1][4], baseline["loss"][-1] - of_tst)

    assert {row[1] for row in config[1:]} == {"superposition.bag_size", "superposition.steps"}
    gain = baseline["loss"][-1] - tst["loss"][-1]
    words = f"tst is {abs(gain):.3f} nats {'below' if gain > 0 else 'above'} baseline"
    assert words in page
    assert not re.search(r'(src|href)="(?!data:)', page), "needs nothing else"
    # the console has the same tables
    for table in (of_runs, flops, loss, data):
        for row in table[1:]:
            assert re.search(r"\s+".join(map(re.escape, row)), result.stdout)
    content = json.loads((output / "comparison.json").read_text())
    (pair,) = content["pairs"]
    assert pair["equal_flops"]["gain"] == pytest.approx(gain)
    assert pair["equal_loss"]["speed_up"]["flops"] == pytest.approx(baseline_at / at)
    assert (output / "loss.png").stat().st_size > 30_000


def test_upstreams_tensorboard_files(runs, job, make_config, one_process, tmp_path):
    """A baseline that TorchTitan's own trainer has run: what ours says, to TensorBoard's digits."""
    folder = tmp_path / "upstream"
    trainer = Trainer(make_config(*job, f"--job.dump_folder={folder}"))
    trainer.train()
    trainer.close()
    assert not (folder / METRICS_FILE).exists()
    upstream, ours = read_curves(folder), read_curves(runs[1])
    assert (upstream.bag_sizes, upstream.boundary) == ((1,), 0)
    for kind in ("training", "validation"):
        points, expected = getattr(upstream, kind), getattr(ours, kind)
        assert len(points) == len(expected)
        for point, other in zip(points, expected, strict=True):
            for key in ("step", "latents", "data_tokens", "flops"):
                value = getattr(other.at, key)
                assert getattr(point.at, key) == pytest.approx(value, rel=1e-6)
            if kind == "training":  # upstream validates on other data each time
                assert point.loss == pytest.approx(other.loss, rel=1e-6)
            assert point.at.hours > 0
    # our own files say the same as metrics.jsonl
    copy = tmp_path / "copy"
    shutil.copytree(runs[0] / "tb", copy)
    (launch,) = copy.iterdir()
    with SummaryWriter(str(copy / f"{launch.name}-2")) as writer:  # and killed before it logged all
        writer.add_scalar(VALIDATION_LOSS, 99.0, STEPS)
        writer.add_scalar(TRAINING_LOSS, 99.0, STEPS)
    assert read_curves(copy).validation[-1].loss == 99
    assert read_curves(copy).training[-1].at.step < STEPS
    shutil.rmtree(copy / f"{launch.name}-2")
    from_files, whole = read_curves(copy, "tst"), read_curves(runs[0])
    assert from_files.stages == whole.stages == Schedule.of([S], [BOUNDARY]).stages
    for point, other in zip(from_files.validation, whole.validation, strict=True):
        assert point.loss == pytest.approx(other.loss, rel=1e-6)
        for key, value in vars(other.at).items():
            assert getattr(point.at, key) == pytest.approx(value, rel=1e-5)


def test_a_run_in_stages(runs, job, train, tst, tmp_path, monkeypatch):
    """Its bag sizes, and a line in the pictures at each change; also from TensorBoard's files."""
    folder, output = tmp_path / "staged", tmp_path / "comparison"
    in_stages = ("--superposition.bag_size=4,2", "--superposition.steps=2,3")
    train(*job, *in_stages, f"--job.dump_folder={folder}")
    lines = []
    monkeypatch.setattr(Axes, "axvline", lambda panel, x, **style: lines.append((x, style)))
    result = tst("compare", folder, runs[1], "--output", output)
    assert result.code == 0, result.stderr
    of_runs = Tables((output / "report.html").read_text()).tables[0]
    assert of_runs[1][1:4] == ["4, 2", str(STEPS), "5"]
    content = json.loads((output / "comparison.json").read_text())
    assert [run["bag_sizes"] for run in content["runs"]] == [[4, 2], [1]]
    styles = [(x, style["linestyle"]) for x, style in lines]
    assert styles[:2] == [(2, ":"), (5, "--")], "over steps"
    assert styles[2:4] == [(2 * 4 * LATENTS, ":"), ((2 * 4 + 3 * 2) * LATENTS, "--")], "over data"
    (folder / METRICS_FILE).unlink()
    assert read_curves(folder).stages == Schedule.of([4, 2], [2, 3]).stages


def test_one_run(runs, tst):
    result = tst("compare", runs[0])
    assert result.code == 0, result.stderr
    assert {"report.html", "loss.png", "comparison.json"} <= {p.name for p in runs[0].iterdir()}
    assert "At equal" not in result.stdout


def test_runs_that_are_going_on(runs, tst, tmp_path):
    """One that is still in superposition and has no validation yet, and one half-way."""
    begun, halfway = tmp_path / "begun", tmp_path / "halfway"
    for folder, run, last in ((begun, runs[0], 4), (halfway, runs[1], 12)):
        folder.mkdir()
        shutil.copy(run / "config.toml", folder)
        lines = [line for line in (run / METRICS_FILE).open() if json.loads(line)["step"] <= last]
        kept = [line for line in lines if folder is halfway or VALIDATION_LOSS not in line]
        (folder / METRICS_FILE).write_text("".join(kept))
    for folders in ([begun], [halfway], [begun, halfway], [runs[0], halfway]):
        result = tst("compare", *folders, "--output", tmp_path / "out")
        assert result.code == 0, result.stderr
    assert "12 of 24" in result.stdout
    _, flops, *_ = Tables((tmp_path / "out" / "report.html").read_text()).tables
    assert flops[1][6] == "no"


def test_bad_input(runs, tst, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for args, message in (
        ([empty], "neither metrics.jsonl nor TensorBoard's files"),
        ([runs[0], runs[0] / ".." / runs[0].name, "--output", empty], "given twice"),
        (runs, "several runs need --output"),
        ([], "give at least one run folder"),
    ):
        result = tst("compare", *args)
        assert result.code != 0
        assert message in result.stderr
    (empty / METRICS_FILE).write_text('{"step": 1, "validation_metrics/loss": 1.0}\n')
    with pytest.raises(MetricsError, match=r"no step of training in metrics\.jsonl"):
        read_curves(empty)
    lines = [json.loads(line) for line in (runs[0] / METRICS_FILE).open()]
    for line in lines:
        line.pop("n_latents_seen", None)
    (empty / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(MetricsError, match=r"has superposition, but .* lack n_latents_seen"):
        read_curves(empty)
    rest = [line for line in lines if line["step"] > 8]  # of the boundary checkpoint, elsewhere
    (empty / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in rest))
    with pytest.raises(MetricsError, match=r"begin at step 12, .* A comparison needs whole runs"):
        read_curves(empty)
    several = tmp_path / "several"
    for run in runs:
        shutil.copytree(run / "tb", several / run.name)
    with pytest.raises(MetricsError, match=r"of several runs\. Give the folder of one run"):
        read_curves(several)
