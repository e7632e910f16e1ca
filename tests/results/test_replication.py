"""docs/results.md says what its CSV files say, and those come from the metrics of runs."""

import csv
import json
import os
import re
import statistics
from dataclasses import replace

import pytest
import tomli
import tomli_w

import replicate
from jobs import ROOT
from replication import analysis, pages, records, sweeps, tables
from torchtitan.experiments.tst.planning.sweep import BAG_SIZE, STEP_RATIO, make

RESULTS = ROOT / "docs" / "results"
EXPRESSION = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)


def rows_of(name):
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def results():
    return analysis.Results(records.read_records(RESULTS / records.RUNS_CSV))


@pytest.mark.parametrize("template", pages.TEMPLATES, ids=lambda template: template.name)
def test_the_pages_are_made_of_the_runs(results, template):
    text = (pages.DOCS / template.name).read_text()
    assert pages.fill_in(template.read_text(), results) == text
    other = [replace(r, loss=r.loss + r.lr) for r in results.records]
    assert pages.fill_in(template.read_text(), analysis.Results(other)) != text
    for image in re.findall(r"\]\((results/\w+\.png)\)", text):
        assert (pages.DOCS / image).stat().st_size > 10_000


@pytest.mark.parametrize("template", pages.TEMPLATES, ids=lambda template: template.name)
def test_no_figure_of_a_run_is_typed(template):
    """Losses and differences have three decimals; in templates, only expressions give any."""
    assert not re.findall(r"\d\.\d{3}", EXPRESSION.sub("", template.read_text()))


def test_the_figures_of_the_readme(results):
    leads = [
        f"{results.lead(of, analysis.baseline_of(of), (1, 2, 3)).mean:.3f}"
        for sizes in (4, [8, 4, 2])
        for of in (pages.recipe(sizes), pages.recipe(sizes, corpus="prose"))
    ]
    text = " ".join((ROOT / "README.md").read_text().split())
    said = "leads by {} on program text and by {} on English prose; with stages, by {} and {} "
    assert said.format(*leads) in text


def test_the_last_loss_of_a_curve_is_the_runs():
    runs, curves = rows_of(records.RUNS_CSV), rows_of(records.CURVES_CSV)
    final = {row["run"]: row["loss"] for row in curves}  # the last line of each
    assert {row["run"]: row["loss"] for row in runs} == final
    assert len(final) == len(runs)


def test_every_run_is_of_a_sweep(results):
    known = {sweep.folder(corpus): corpus for sweep in sweeps.SWEEPS for corpus in sweep.corpora}
    for record in results.records:
        folder, _, _ = record.run.rpartition("/")
        assert known[folder] == record.corpus


def test_a_comparison_of_the_files(results):
    """Once more from the files, for some cells."""
    final = {row["run"]: float(row["loss"]) for row in rows_of(records.RUNS_CSV)}

    def of(name):
        return [final[f"small_bag_size/program/{name},seed={seed}"] for seed in (0, 1, 2)]

    losses = of("bag_size=4")
    leads = [b - loss for b, loss in zip(of("baseline"), losses, strict=True)]
    table = tables.comparison(results, [pages.small(4)], (0, 1, 2))
    half = 4.30265 * statistics.stdev(leads) / 3**0.5  # t of 2 degrees of freedom, 97.5 %
    mean = statistics.mean(leads)
    assert [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]] == [
        "s = 4, r = 0.3",
        "3",
        "18.68M",
        f"{statistics.mean(losses):.3f}",
        f"{statistics.stdev(losses):.3f}",
        f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})",
    ]
    surface = tables.surface(results, pages.small(), 0)
    assert surface.losses[0.1, 2] == final["small_step_ratio/program/bag_size=2,step_ratio=0.1"]
    assert surface.losses[0.3, 8] == final["small_bag_size/program/bag_size=8,seed=0"]
    assert surface.baseline == final["small_bag_size/program/baseline,seed=0"]
    assert len(surface.losses) == 20


def test_leads():
    lead = analysis.Lead((0.1, 0.2, 0.3))
    assert lead.mean == pytest.approx(0.2)
    assert lead.standard_error == pytest.approx(0.1 / 3**0.5)
    assert lead.interval == pytest.approx((0.2 - 0.248414, 0.2 + 0.248414), abs=1e-4)
    assert (lead + analysis.Lead((-0.1,))).wins == 3
    assert str(analysis.Lead((-0.0124,))) == "-0.012"


def test_intervals_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    differences = [0.1, 0.4, 0.2, 0.3, 0.1, 0.5, 0.2, 0.6, 0.1, 0.3, 0.2, 0.4]
    for n in range(2, 13):
        low, high = stats.ttest_1samp(differences[:n], 0).confidence_interval(0.95)
        interval = analysis.Lead(tuple(differences[:n])).interval
        assert interval == pytest.approx((low, high), abs=3e-4)


def test_plots_of_few_runs(tmp_path, results):
    """Another output has only what was run into it."""
    pages.draw(analysis.Results([]), {}, tmp_path)
    assert not list(tmp_path.iterdir())
    of_small = analysis.Results([run for run in results.records if run.model == "demo_small"])
    pages.draw(of_small, {}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["surface.png"]


def test_names_of_recipes():
    assert pages.recipe().schedule == "baseline"
    assert pages.recipe(4, 0.45).schedule == "s = 4, r = 0.45"
    assert pages.recipe([16, 8, 4, 2], 0.45, steps=3000).schedule == "s = 16, 8, 4, 2, r = 0.45"
    unequal = pages.recipe([8, 4, 2], [0.1, 0.1, 0.25])
    assert unequal.stages == "8x300 4x300 2x750"
    assert unequal.schedule == "s = 8, 4, 2, r = 0.45 (0.1 + 0.1 + 0.25)"
    assert pages.small(4, mode="output").schedule == "s = 4, r = 0.3, bags out only"
    assert pages.small(4, reinit=True).schedule == "s = 4, r = 0.3, re-initialised"
    assert analysis.baseline_of(pages.small(4, reinit=True)) == pages.small()


def write_metrics(folder, toml, steps, loss, data_tokens):
    """A run's folder, as far as it is read."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(tomli_w.dumps(toml))
    line = {
        "step": steps,
        "phase": "recovery",
        "loss_metrics/global_avg_loss": 1.0,
        "tflops": 1.0,
        "throughput(tps)": 1e6,
        "time_metrics/end_to_end(s)": 0.5,
        "n_tokens_seen": data_tokens,
        "n_latents_seen": 100,
    }
    first = line | {"step": 1, "n_tokens_seen": 1, "n_latents_seen": 1}
    validation = {"step": steps, "validation_metrics/loss": loss}
    lines = [json.dumps(each) + "\n" for each in (first, line, validation)]
    (folder / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture
def sweep():
    return sweeps.Sweep(
        "bag_size", {BAG_SIZE: ["1", "[8,4]"], "debug.seed": ["0", "1"]}, (f"--{STEP_RATIO}=0.3",)
    )


def test_what_runs_leave_is_gathered(tmp_path, sweep):
    folder, output = tmp_path / "sweeps", tmp_path / "out"
    points = make(folder / "bag_size" / "program", sweep.base, sweep.vary, [*sweep.arguments])
    steps = tomli.loads((ROOT / sweep.base).read_text())["training"]["steps"]
    for number, point in enumerate(points[:3]):  # the fourth has not been run
        run = folder / "bag_size" / "program" / "runs" / point.name
        write_metrics(run, point.toml, steps, 3.0 + number, 100 * (number + 1))
    elsewhere = replace(page_record(), run="bag_size/program/of another machine")
    records.write(output, [elsewhere], {elsewhere.run: {1: 5.0}})
    for _ in range(2):  # a second time changes nothing
        replicate.gather([sweep], folder, output)
        found = sorted(records.read_records(output / records.RUNS_CSV), key=lambda run: run.loss)
        assert [record.loss for record in found] == [3.0, 4.0, 5.0, elsewhere.loss]
        assert [record.seed for record in found] == [0, 1, 0, elsewhere.seed]
        assert [record.data_tokens for record in found[:3]] == [100, 200, 300]
        assert found[0].hours == pytest.approx(steps / 2 / 3600)
        assert found[2].stages == f"8x{round(0.15 * steps)} 4x{round(0.15 * steps)}"
        assert found[3] == elsewhere
    assert analysis.Results(found).lead(found[2].recipe, found[0].recipe).differences == (-2,)
    losses = records.read_losses(output / records.CURVES_CSV)
    assert losses["bag_size/program/baseline,seed=1"] == {steps: 4.0}


def page_record():
    """Some record."""
    return records.Record(
        **vars(pages.recipe()),
        run="",
        seed=7,
        parameters=1,
        latents=1,
        data_tokens=1,
        loss=9.0,
        hours=1.0,
    )


def test_recorded_runs_are_not_made_again(tmp_path, sweep, monkeypatch):
    folder, output = tmp_path / "sweeps", tmp_path / "out"
    skipped = []
    monkeypatch.setattr(replicate, "run_unfinished", lambda *_, skip: skipped.append(skip))
    record = replace(page_record(), run="bag_size/program/baseline,seed=1")
    records.write(output, [record], {record.run: {1: 5.0}})
    replicate.run([sweep], folder, output, 1)
    assert skipped == [{"baseline,seed=1"}]


def test_a_corpus_that_is_missing(tmp_path, monkeypatch, run_script):
    monkeypatch.setitem(sweeps.CORPORA, "prose", sweeps.Corpus(str(tmp_path / "no"), "make it so"))
    prose = sweeps.Sweep("prose", {BAG_SIZE: ["1"]}, corpora=("prose",))
    monkeypatch.setattr(replicate, "SWEEPS", [prose])
    monkeypatch.setattr(replicate, "ON_CPU", ["prose"])
    ended = run_script("replicate", "--output", tmp_path / "out", "--folder", tmp_path / "sweeps")
    assert ended.code == 2
    assert "is missing; make it with `make it so`" in ended.stderr
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.slow
def test_the_gpu_runs_on_cpu(tmp_path, corpus, tokens, monkeypatch, run_script):
    """Every step of the GPU replication, with a smaller model, batch and number of steps."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, target in (
        ("tokenizer", corpus / "tokenizer"),
        ("tokens", tokens),
        ("validation.jsonl", corpus / "validation.jsonl"),
    ):
        (folder / name).symlink_to(target)
    monkeypatch.setitem(sweeps.CORPORA, "packages", sweeps.Corpus(os.path.relpath(folder, ROOT)))
    (gpu,) = (sweep for sweep in sweeps.SWEEPS if sweep.name == "gpu")
    gpu = replace(gpu, vary=gpu.vary | {sweeps.SEED: ["0"]})
    monkeypatch.setattr(replicate, "SWEEPS", [gpu])
    small = [
        "--model.flavor=demo",
        "--training.steps=20",
        "--training.seq_len=32",
        "--training.local_batch_size=4",
        "--training.global_batch_size=4",
        "--validation.seq_len=32",
        "--validation.local_batch_size=4",
        "--validation.steps=2",
        "--validation.freq=10",
        "--metrics.log_freq=5",
        "--checkpoint.interval=10",
    ]
    made = run_script(
        "replicate",
        "--only",
        "gpu",
        "--folder",
        tmp_path / "sweeps",
        "--output",
        tmp_path / "out",
        *small,
    )
    assert made.code == 0, made.stderr
    found = records.read_records(tmp_path / "out" / records.RUNS_CSV)
    latents = 20 * 4 * 32
    assert {(run.stages, run.latents, run.data_tokens) for run in found} == {
        ("", latents, latents),
        ("4x6", latents, latents + 3 * 6 * 4 * 32),
        ("8x6", latents, latents + 7 * 6 * 4 * 32),
    }
