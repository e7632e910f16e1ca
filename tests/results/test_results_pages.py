"""docs/results.md and docs/experiments.md say what the CSV files say."""

import csv
import random
import re
import statistics
from dataclasses import replace

import pytest

from jobs import ROOT
from replication import analysis, pages, records, sweeps, tables

RESULTS = ROOT / "docs" / "results"
EXPRESSION = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)


def rows_of(name):
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def results():
    return analysis.Results(records.read_records(RESULTS / records.RUNS_CSV))


FIGURE = re.compile(r"\d\.\d{3}\b")


def with_other_losses(results, seed):
    noise = random.Random(seed)
    return [replace(run, loss=run.loss + noise.uniform(1, 2)) for run in results.records]


def unchanged_figures(text, other):
    """Figures of a page that are the same in another one."""
    pairs = zip(FIGURE.findall(text), FIGURE.findall(other), strict=True)
    return {before for before, after in pairs if before == after}


@pytest.mark.parametrize("template", pages.TEMPLATES, ids=lambda template: template.name)
def test_the_pages_are_made_of_the_runs(results, template, monkeypatch):
    text = (pages.DOCS / template.name).read_text()
    assert pages.fill_in(template.read_text(), results) == text
    for image in re.findall(r"\]\((results/\w+\.png)\)", text):
        assert (pages.DOCS / image).stat().st_size > 10_000
    for name in ("paper_lead", "paper_gain", "paper_reinit"):
        monkeypatch.setattr(pages, name, lambda *_: 9.0)
    unchanged = [
        unchanged_figures(text, pages.fill_in(template.read_text(), analysis.Results(others)))
        for others in (with_other_losses(results, seed) for seed in (0, 1))
    ]
    rates = {f"{run.lr:.3f}" for run in results.records}
    assert set.intersection(*unchanged) <= rates, "of other losses, ours and the paper's"


@pytest.mark.parametrize("template", pages.TEMPLATES, ids=lambda template: template.name)
def test_no_figure_of_a_run_is_typed(template):
    """Losses and differences have three decimals; in templates, only expressions give any."""
    assert not re.findall(r"\d\.\d{3}", EXPRESSION.sub("", template.read_text()))


def test_the_figures_of_the_readme(results):
    text = " ".join((ROOT / "README.md").read_text().split())

    def lead(of):
        return results.lead(of, analysis.baseline_of(of), pages.FRESH_SEEDS)

    for name, sizes in (
        ("baseline, equal FLOPs", 1),
        ("TST, *s* = 4, *r* = 0.3", 4),
        ("TST with [stages](docs/stages.md), *s* = 8, 4, 2, *r* = 0.3", [8, 4, 2]),
    ):
        of = pages.recipe(sizes)
        loss = tables.mean(results.runs(of, pages.FRESH_SEEDS))
        assert f"| {name} | {loss:.3f} | {lead(of) if of.stages else ''}" in text
    tst, stages = (lead(pages.recipe(sizes, corpus="prose")) for sizes in (4, [8, 4, 2]))
    assert f"On English prose TST leads by {tst}, with stages by {stages}." in text
    half = results.lead(pages.recipe(4), pages.recipe(steps=6000), pages.FRESH_SEEDS)
    assert f"3,000 steps of TST end level with 6,000 of the baseline: lower by {half}." in text


def test_the_last_loss_of_a_curve_is_the_runs():
    runs, curves = rows_of(records.RUNS_CSV), rows_of(records.CURVES_CSV)
    final = {row["run"]: row["loss"] for row in curves}  # the last line of each
    assert {row["run"]: row["loss"] for row in runs} == final
    assert len(final) == len(runs)


def test_every_run_is_of_a_sweep_or_a_variant_in_the_log(results):
    known = {sweep.folder(corpus): corpus for sweep in sweeps.SWEEPS for corpus in sweep.corpora}
    log = (ROOT / "docs" / "experiments.md").read_text()
    for record in results.records:
        folder, _, _ = record.run.rpartition("/")
        if record.variant:
            assert record.variant in log
        else:
            assert known[folder] == record.corpus
    records.check_corpora([(r.corpus, r.corpus_id) for r in results.records], RESULTS)


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
    assert surface.values[0.1, 2] == final["small_step_ratio/program/bag_size=2,step_ratio=0.1"]
    assert surface.values[0.3, 8] == final["small_bag_size/program/bag_size=8,seed=0"]
    assert surface.baseline == final["small_bag_size/program/baseline,seed=0"]
    assert len(surface.values) == 20


def test_leads():
    lead = analysis.Lead({1: 0.1, 2: 0.2, 3: 0.3})
    assert lead.mean == pytest.approx(0.2)
    assert lead.standard_error == pytest.approx(0.1 / 3**0.5)
    half = 4.30265 * 0.1 / 3**0.5  # t of 2 degrees of freedom, 97.5 %
    assert lead.interval == pytest.approx((0.2 - half, 0.2 + half), abs=1e-5)
    assert lead.n == 3


@pytest.mark.parametrize(
    ("differences", "text", "verdict"),
    [
        ((), "", "not run"),
        ((-0.0124,), "-0.012", "1 pair"),
        ((0.1, 0.11), "+0.105 (+0.041 to +0.169)", "yes"),
        ((-0.1, -0.11), "-0.105 (-0.169 to -0.041)", "no"),
        ((0.1, 0.2), "+0.150 (-0.485 to +0.785)", "not shown"),
    ],
)
def test_a_lead_in_words(differences, text, verdict):
    lead = analysis.Lead(dict(enumerate(differences)))
    assert str(lead) == text
    assert lead.verdict == verdict


def test_several_corpora_with_one_seed_are_one_pair():
    lead = analysis.mean_lead([analysis.Lead({1: 0.1, 2: 0.2}), analysis.Lead({2: 0.4, 1: 0.3})])
    assert lead.differences == pytest.approx({1: 0.2, 2: 0.3})


def test_the_plots_of_the_pages(tmp_path, results):
    pages.draw(results, records.read_losses(RESULTS / records.CURVES_CSV), tmp_path)
    text = "".join((pages.DOCS / template.name).read_text() for template in pages.TEMPLATES)
    shown = set(re.findall(r"\]\(results/(\w+\.png)\)", text))
    assert shown == {path.name for path in tmp_path.iterdir()}


def test_the_same_run_twice(results):
    twice = [*results.records, replace(results.records[0], run="another/name")]
    with pytest.raises(ValueError, match=r"another/name and .* are the same run: remove one"):
        analysis.Results(twice).recipes()


def test_plots_of_few_runs(tmp_path, results):
    """Another output has only what was run into it."""
    pages.draw(analysis.Results([]), {}, tmp_path)
    assert not list(tmp_path.iterdir())
    of_small = analysis.Results([run for run in results.records if run.model == "demo_small"])
    pages.draw(of_small, {}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["surface.png"]
    baselines = analysis.Results([run for run in of_small.records if not run.stages])
    (tmp_path / "surface.png").unlink()
    pages.draw(baselines, {}, tmp_path)
    assert not list(tmp_path.iterdir())


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
