"""The command that holds every layout to one process; what it finds is in test_distributed.py."""

import json
import math

import pytest

import check_parallelism
from check_parallelism import obstacle
from torchtitan.experiments.tst.testing.layouts import LAYOUTS, Layout
from torchtitan.experiments.tst.testing.runs import Deviation, Runs, Step, relative
from torchtitan.experiments.tst.testing.runs import deviation as largest_deviation


def test_table_progress_and_json(run_script, tmp_path):
    only = "^(TP 2|FSDP 2, varlen, documents)$"
    arguments = ("--only", only, "--models", "llama3", "--output", tmp_path / "runs")
    result = run_script("check_parallelism", *arguments)
    assert result.code == 0, result.stderr
    assert "1/1  llama3, TP 2: " in result.stdout
    lines = result.stdout.splitlines()
    (row,) = (line for line in lines if line.startswith("TP 2 "))
    assert len(row.split()) == len(["TP", "2", "processes"]) + 2 * 3
    assert "FSDP 2, varlen, documents: torch has variable-length attention on CUDA only" in lines
    assert lines[-1].startswith("1 of 1 agree within 1e-05")
    report = json.loads((tmp_path / "runs/parallelism.json").read_text())
    assert [(cell["layout"], cell["model"]) for cell in report] == [("TP 2", "llama3")]


def test_what_does_not_agree_or_fails_is_told(run_script, tmp_path, monkeypatch):
    layouts = [Layout({"TP": 2}, models=("llama3",), note=note) for note in ("far", "broken")]
    monkeypatch.setattr(check_parallelism, "LAYOUTS", layouts)

    def run(self, arguments, processes, folder):
        if "broken" in folder.name:
            return [], "superposition.bag_size = -1"
        far = 1 + 2e-5 * (processes > 1)
        return [Step({"loss": far}, far, {"weight": [far]})] * self.steps, ""

    monkeypatch.setattr(Runs, "_run", run)
    arguments = ("--models", "llama3", "--output", tmp_path)
    result = run_script("check_parallelism", *arguments)
    assert result.code == 1
    assert "2e-05 2e-05 2e-05 !" in result.stdout
    assert "superposition.bag_size = -1" in result.stderr
    assert "0 of 2 agree" in result.stdout
    result = run_script("check_parallelism", "--only", "XP", "--output", tmp_path)
    assert result.code == 2
    assert "no layout of llama3, qwen3, qwen3 MoE, llama4 matches 'XP'" in result.stderr


@pytest.mark.parametrize(
    ("value", "reference", "deviation"),
    [(1.1, 1.0, 0.1), (0.0, 0.0, 0.0), (1e-9, 0.0, math.inf), (math.nan, 1.0, math.inf)],
)
def test_relative_deviation(value, reference, deviation):
    assert relative(value, reference) == pytest.approx(deviation)


def test_the_worst_rank_and_parameter_counts():
    of_one = [Step({"loss": 2.0}, 1.0, {"a": [1.0], "b": [4.0]})]
    found = largest_deviation([Step({"loss": 2.0}, 1.1, {"a": [1.0, 1.0], "b": [4, 5]})], of_one)
    assert found == Deviation(0.0, pytest.approx(0.1), 0.25)
    assert found.within(0.25) and not found.within(0.2)


def test_what_a_machine_with_gpus_leaves_out():
    by_name = {layout.name: layout for layout in LAYOUTS}
    assert obstacle(by_name["TP 4"], gpus=2) == "needs 4 GPUs"
    assert "float32" in obstacle(by_name["CP 2, weighted"], gpus=2)
    for name in ("TP 2", "FSDP 2, varlen, documents", "CP 2, flex, documents, ptrr"):
        assert obstacle(by_name[name], gpus=2) == ""
