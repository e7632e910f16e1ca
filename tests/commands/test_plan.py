"""``tst plan`` as a user runs it."""

import re

import pytest

from torchtitan.experiments.tst.planning import summary

DEMO = "train_configs/demo/tst.toml"
PAPER = "train_configs/paper"


def test_plan(tst, tmp_path):
    plot = tmp_path / "plan.png"
    result = tst("plan", f"{PAPER}/270M-20k-tst.toml", "--no-memory", "--plot", plot)
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
    assert "1,024 sequences = 8 data-parallel ranks x 16 x 8 micro-batches" in result.stdout
    assert "./data/dclm-llama3" in result.stdout and "no such folder" in result.stdout
    assert "s from 3 to 8, r from 0.2 to 0.4" in result.stdout
    assert "3.1423" in result.stdout  # r = 0.3, s = 6
    assert plot.stat().st_size > 10_000


def test_plan_of_stages(tst, tmp_path):
    """A column for each, and the paper's losses around their mean."""
    job, plot = f"{PAPER}/270M-20k-tst.toml", tmp_path / "plan.png"
    result = tst("plan", job, "--no-memory", "--superposition.bag_size=8,4,2", "--plot", plot)
    assert result.code == 0, result.stderr
    lines = result.stdout.splitlines()
    rows = {line[:22].strip(): line[22:].split() for line in lines if line[:2] == "  "}
    assert rows[""] == [*["superposition"] * 3, "recovery", "total"]
    assert rows["steps"] == ["2,000", "2,000", "2,000", "14,000", "20,000"]
    assert rows["bag size"] == ["8", "4", "2", "1"]
    step = 2**21
    assert rows["data tokens a step"] == [f"{s * step:,}" for s in (8, 4, 2, 1)]
    assert rows["latents a step"] == [f"{step:,}"] * 4
    tokens = [2000 * s * step for s in (8, 4, 2)] + [14_000 * step]
    assert rows["data tokens"] == [f"{n / 1e9:.2f}B" for n in (*tokens, sum(tokens))]
    assert rows["B200 hours"][-1] == "34.0", "as with one bag size"
    assert f"Data: {sum(tokens) + 1024 * 20_000:,} tokens of" in result.stdout
    assert (
        "the paper's runs have one bag size; the losses near the mean of these stages, s = 4.7:"
        in result.stdout
    )
    (columns,) = (line.split()[3:] for line in lines if "r \\ s" in line)
    assert columns == ["3", "4", "5", "6"]
    assert plot.stat().st_size > 10_000


def test_memory_of_stages(tst):
    result = tst("plan", DEMO, "--superposition.bag_size=8,2")
    assert result.code == 0, result.stderr
    for stage in ("superposition (s=8)", "superposition (s=2)", "recovery"):
        assert f"at the peak of a step of {stage}: " in result.stdout


def test_plan_of_another_machine(tst, tokens):
    args = ["--gpu", "H100", "--ranks", 16, "--mfu", 0.5]
    args += ["--training.local_batch_size=2", f"--training.dataset_path={tokens}"]
    result = tst("plan", DEMO, *args)
    assert result.code == 0, result.stderr
    assert "on 16 H100 at 50 % MFU (given)" in result.stdout
    assert re.search(r"Memory: 0\.\d GB of 80 GB on each GPU", result.stdout)
    assert re.search(
        r"Data: 23,539,200 tokens of .*, which has [\d,]+: [\d.]+ epochs, NOT", result.stdout
    )


def test_layouts(tst):
    """The table, the layout to take, and arguments with which the job passes the checks."""
    job = f"{PAPER}/10B-A1B-50k-tst.toml"
    result = tst("plan", job, "--layouts", "--ranks", 16, "--rows", 3, "--gpu", "H200")
    assert result.code == 0, result.stderr
    about, times, _, count, header, *rows = result.stdout.splitlines()
    assert "on 16 H200, 8 a node; a step is 2,048 sequences of 4,096 latents" in about
    assert "selective (2)" in about
    assert "40 % MFU; each GPU receives 450 GB/s over NVLink and 50 GB/s over the network" in times
    assert re.match(
        r"Layouts: \d+ accepted by TorchTitan; \d+ fit 127 GB \(141 GB less 10 %\)", count
    )
    assert header.split()[:2] == ["layout", "batch"] and "worst" in header
    table, (take, arguments) = rows[:3], rows[-2:]
    assert all(" dp_" in row and " %" in row for row in table)
    assert take.startswith(f"Take {table[0].split('  ')[1]}: ")
    checked = tst("check", job, "--ranks", 16, *arguments.split())
    assert "parallelism" not in checked.stderr and "training.global_batch_size" not in (
        checked.stderr
    )


def test_layouts_of_small_nodes(tst):
    """Four GPUs a node: more of FSDP's ring crosses the network."""
    args = ["plan", DEMO, "--layouts", "--ranks", 8, "--rows", 1000]
    crossing = []
    for node in (8, 4):
        result = tst(*args, "--gpus-per-node", node, "--superposition.bag_size=1")
        assert result.code == 0, result.stderr
        header, *rows = result.stdout.splitlines()[4:]
        (row,) = (row for row in rows if row.startswith("  dp_shard 8 "))
        assert header.split()[-4:] == ["NVLink", "network", "comm", "step"]
        crossing.append(float(row.split()[-3]))
    assert crossing[0] == 0 < crossing[1]


def test_a_plan_without_an_estimate(tst, monkeypatch):
    def faulty(config, *args):
        raise RuntimeError("a fault\nof two lines")

    monkeypatch.setattr(summary, "dry_run", faulty)
    result = tst("plan", DEMO)
    assert result.code == 0, result.stderr
    assert "Memory: could not be estimated: RuntimeError: a fault of two lines\n" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--mfu", "0"], "--mfu 0.0: must be in (0, 1]"),
        (["--ranks", "-8"], "--ranks -8: must be at least 1"),
        (
            ["--layouts", "--parallelism.pipeline_parallel_schedule=none"],
            "parallelism.pipeline_parallel_schedule = 'none'",
        ),
        (["--gpus-per-node", "0"], "--gpus-per-node 0: must be at least 1"),
        (["--parallelism.data_parallel_replicate_degree=0"], "must be an integer of at least 1"),
        (["--job.config_file=none.toml"], "none.toml"),
        (["--ranks", "7"], "parallelism.data_parallel_shard_degree = 8"),
        (["--superposition.bag_size=0"], "superposition.bag_size = 0"),
    ],
)
def test_plan_of_bad_input(tst, args, message):
    result = tst("plan", f"{PAPER}/270M-20k-tst.toml", *args)
    assert result.code == 2
    assert message in result.stderr
