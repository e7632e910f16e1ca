"""An error that ends a job is said once for all ranks, in one line."""

import os

import pytest

import launches
from jobs import ON, TST
from torchtitan.experiments.tst.resilience import reporting
from torchtitan.experiments.tst.testing import ranks

LAUNCH = "torchtitan.experiments.tst.launch"
ON_THIS_NODE = ("--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")
ON_THIS_NODE += ("--local-ranks-filter=1", "--tee=3")


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--metrics.log_freq=0"], "config error: metrics.log_freq = 0: must be"),
        (["--training.stepz=3"], "config error: training.stepz = '3': unknown key"),
        (["--training.dataset_path=/none"], "config error: training.dataset_path = '/none': "),
        (["--job.config_file=/none.toml"], "config error: job.config_file = '/none.toml': No such"),
    ],
)
def test_a_job_on_two_ranks(base_args, tmp_path, args, error):
    result = launches.fork(TST, [*base_args, *ON, *args], 2, tmp_path / "logs")
    assert result.failed
    assert result.output.count("error") == 1, result.output
    assert result.output.count(error) == 1
    assert "Traceback" not in result.output


def end_with(errors):
    reporting.PATIENCE = 0.5
    if error := errors[int(os.environ["RANK"])]:
        reporting.end_with(error)


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (["no data", "no data"], ["no data"]),
        (["no data", ""], ["no data"]),
        (["no data", "no disk"], ["no data", "rank 1: no disk"]),
        (["", "no disk"], ["rank 1: no disk"]),
    ],
)
def test_ranks_that_say_the_same_and_others(tmp_path, errors, said):
    failure = ranks.run_ranks(end_with, 2, tmp_path, errors)
    assert f"ended with {reporting.EXIT_CODE}" in failure
    logs = [(tmp_path / ranks.LOG.format(rank=rank)).read_text() for rank in (0, 1)]
    assert "".join(logs).splitlines() == said


def test_rank_0_is_gone(tmp_path, monkeypatch):
    """With its launcher, which has said why."""
    port = ranks.free_port()
    for name, value in {
        "RANK": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(reporting, "PATIENCE", 1.0)
    monkeypatch.setattr(reporting, "_report", pytest.fail)
    with pytest.raises(SystemExit) as ended:
        reporting.end_with("no data")
    assert ended.value.code == reporting.EXIT_CODE


def test_without_a_launcher(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        reporting.end_with("no data")
    assert ended.value.code == reporting.EXIT_CODE
    assert capsys.readouterr().err == "no data\n"


@pytest.mark.parametrize(
    ("errors", "said"),
    [(("no data", "no data"), "no data"), (("", "no disk"), "rank 1: no disk")],
)
def test_the_launcher_says_it(tmp_path, errors, said):
    """Whichever ranks are shown, without a traceback and torchrun's table; with the exit code."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, time\n"
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "from torchtitan.experiments.tst.resilience import reporting\n"
        f"reporting.PATIENCE = {20 if errors[0] else 0.5}\n"
        f"error = {errors}[int(os.environ['RANK'])]\n"
        "@record\n"
        "def upstream(): raise ValueError(error)\n"
        "if not error: time.sleep(60)\n"
        "try: upstream()\n"
        "except ValueError: reporting.end_with(error)\n"
    )
    launcher = launches.start(LAUNCH, [*ON_THIS_NODE, str(rank)], tmp_path / "launcher")
    launcher.join(120)
    assert launcher.exitcode == reporting.EXIT_CODE
    output = (tmp_path / "launcher" / ranks.LOG.format(rank=0)).read_text()
    of_torchrun = "torch/distributed/run.py"  # that it sets OMP_NUM_THREADS
    assert [line for line in output.splitlines() if of_torchrun not in line] == [said]


def test_the_launcher_shows_more_of_other_failures(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "error.txt").write_text("no data")
    files = [str(tmp_path / rank / "error.json") for rank in "01"]
    assert reporting.texts_of(files) == ["no data"]
    assert reporting.is_all([2, -15]) and reporting.is_all([2, 2])
    assert not reporting.is_all([2, 1]) and not reporting.is_all([-9, -15])
