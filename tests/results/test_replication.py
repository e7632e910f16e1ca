"""docs/results.md says what its CSV files say, and those come from the metrics of runs."""

import csv
import json
import re
import statistics
from dataclasses import replace

import pytest
import tomli
import tomli_w

import replicate
import replication_results
from jobs import ROOT
from torchtitan.experiments.tst.planning.sweep import BAG_SIZE, make

RESULTS = ROOT / "docs" / "results"


def rows_of(name):
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def results():
    return replication_results.Results(
        replication_results.read_records(RESULTS / replication_results.RUNS_CSV)
    )


def test_the_documents_tables_are_those_of_the_runs(results):
    text = replicate.DOCUMENT.read_text()
    assert replication_results.fill_in(text, results) == text
    assert text.count("<!-- table: ") == len(replication_results.tables(results))
    other = [replace(r, loss=r.loss + r.seed) for r in results.records]
    assert replication_results.fill_in(text, replication_results.Results(other)) != text
    for image in re.findall(r"\]\((results/\w+\.png)\)", text):
        assert (ROOT / "docs" / image).stat().st_size > 10_000


def test_the_tables_figures(results):
    """Once more from the files, for some of them."""
    runs, curves = rows_of(replication_results.RUNS_CSV), rows_of(replication_results.CURVES_CSV)
    final = {row["run"]: float(row["loss"]) for row in curves}  # the last line of each
    assert {row["run"]: float(row["loss"]) for row in runs} == final
    tables = replication_results.tables(results)

    def of(s):
        name = f"bag_size={s}" if s > 1 else "baseline"
        return [final[f"bag_size/{name},seed={seed}"] for seed in (0, 1, 2)]

    rows = {row[0]: row for row in tables["variants"]}
    for s in (2, 4, 8, 16):
        losses, row = of(s), rows[f"TST, s = {s}"]
        assert row[2] == f"{statistics.mean(losses):.4f}"
        assert row[3] == f"{statistics.stdev(losses):.4f}"
        leads = [b - loss for b, loss in zip(of(1), losses, strict=True)]
        assert row[5].startswith(f"{statistics.mean(leads):+.3f} ({leads[0]:+.3f}, ")
    cells = {
        (row[0], s): cell
        for row in tables["surface"][1:]
        for s, cell in zip(tables["surface"][0][1:], row[1:], strict=True)
    }
    assert cells["0.3", "8"] == f"{final['bag_size/bag_size=8,seed=0']:.4f}"
    assert cells["0.1", "2"] == f"{final['step_ratio/bag_size=2,step_ratio=0.1']:.4f}"
    by_steps = {row[0]: row for row in tables["steps"][1:]}
    lead = final["steps/baseline,steps=4800"] - final["steps/steps=4800,bag_size=4"]
    assert by_steps["4,800"][4] == f"{lead:+.3f}"


def test_what_runs_leave_is_gathered(tmp_path, monkeypatch):
    monkeypatch.setattr(
        replicate,
        "SWEEPS",
        {"bag_size": ({BAG_SIZE: ["1", "4"], "debug.seed": ["0", "1"]}, [])},
    )
    vary, arguments = replicate.SWEEPS["bag_size"]
    points = make(tmp_path / "sweeps" / "bag_size", replicate.BASE, vary, arguments)
    for number, point in enumerate(points[:3]):  # the fourth has not been run
        folder = tmp_path / "sweeps" / "bag_size" / "runs" / point.name
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(tomli_w.dumps(point.toml))
        line = {
            "step": 2400,
            "phase": "recovery",
            "loss_metrics/global_avg_loss": 1.0,
            "tflops": 1.0,
            "throughput(tps)": 1e6,
            "time_metrics/end_to_end(s)": 0.5,
            "n_tokens_seen": 100 * (number + 1),
            "n_latents_seen": 100,
        }
        first = line | {"step": 1, "n_tokens_seen": 1, "n_latents_seen": 1}
        validation = {"step": 2400, "validation_metrics/loss": 3.0 + number}
        lines = [json.dumps(each) + "\n" for each in (first, line, validation)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    replicate.gather(tmp_path / "sweeps", tmp_path / "out")
    records = replication_results.read_records(tmp_path / "out" / replication_results.RUNS_CSV)
    assert [record.loss for record in records] == [3.0, 4.0, 5.0]
    assert [record.variant for record in records] == ["baseline", "baseline", "TST, s = 4"]
    assert [record.seed for record in records] == [0, 1, 0]
    assert [record.step_ratio for record in records] == [0, 0, 0.3]
    assert [record.data_tokens for record in records] == [100, 200, 300]
    assert records[0].hours == pytest.approx(1200 / 3600)
    assert replication_results.Results(records).lead(records[2]) == -2
    losses = replication_results.read_losses(tmp_path / "out" / replication_results.CURVES_CSV)
    assert losses["bag_size/baseline,seed=1"] == {2400: 4.0}


def test_the_configs_are_of_the_papers_regime(results):
    base = tomli.loads((ROOT / replicate.BASE).read_text())
    assert results.base.steps == base["training"]["steps"]
    assert results.base.latents / results.base.parameters > 100
