"""Runs that are asked to stop, and runs that meet numbers that are not finite."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import launches
from corpora import write_shards
from jobs import ON, ROOT, SAVE, SAVE_LAST, load_full, losses, poisoned_at
from launches import signal_every_process
from torchtitan.experiments.tst.resilience.checkpoint import inventory, manifests
from torchtitan.experiments.tst.resilience.step_check import NonFiniteError
from torchtitan.experiments.tst.resilience.stop import STOP_SIGNALS, STOPPED_EXIT_CODE, Stopped
from torchtitan.experiments.tst.testing import ranks
from torchtitan.experiments.tst.testing.ranks import free_port
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer


@pytest.fixture(autouse=True)
def default_handlers():
    """A run that has stopped ignores the signals, as its process is about to end."""
    yield
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def stopping_at(step, number=signal.SIGTERM):
    class Trainer(SuperpositionTrainer):
        def forward_backward_step(self, **kwargs):
            if self.step == step:
                os.kill(os.getpid(), number)
                while not self.stop_request.signal:  # another thread receives it
                    time.sleep(0.001)
            return super().forward_backward_step(**kwargs)

    return Trainer


@pytest.mark.parametrize(
    ("step", "stops", "mode", "number"),
    [
        (2, 3, "disabled", signal.SIGTERM),
        (3, 3, "disabled", signal.SIGUSR1),
        (4, 5, "disabled", signal.SIGUSR1),
        (2, 3, "async", signal.SIGUSR1),
        (3, 3, "async", signal.SIGTERM),
        (4, 5, "async", signal.SIGTERM),
    ],
)
def test_stops_within_two_steps_with_a_checkpoint(
    whole, train, tmp_path, step, stops, mode, number
):
    """After the step if it is saved anyway; else after the next, when the host reads of it."""
    mode = f"--checkpoint.async_mode={mode}"
    with pytest.raises(Stopped) as stopped:
        train(*ON, *SAVE_LAST, mode, trainer_class=stopping_at(step, number))
    assert stopped.value.code == STOPPED_EXIT_CODE == 75
    folder = tmp_path / "run" / "checkpoint"
    assert inventory.complete_steps(folder)[-1] == stops
    manifest = manifests.read_manifest(folder / f"step-{stops}")
    assert manifests.damages(folder / f"step-{stops}", manifest["files"]) == []
    assert losses(train(*ON, *SAVE_LAST)) == whole.losses


@pytest.mark.parametrize("step", [5, 6])
def test_asked_to_stop_too_late(train, step):
    lines = train(*ON, *SAVE_LAST, trainer_class=stopping_at(step))
    assert losses(lines).keys() == {1, 2, 3, 4, 5, 6}
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == [signal.SIG_DFL] * 2


def test_a_second_signal_ends_at_once():
    """Wherever the main thread is, such as in a collective that hangs."""
    script = """if True:
        import ctypes, os, signal, threading, time
        import torch  # brings threads that do not block the signals
        from torchtitan.experiments.tst.resilience import stop
        request = stop.StopRequest()
        request.listen()

        def send():
            os.kill(os.getpid(), signal.SIGUSR1)
            while not request.signal:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)  # the same, from another sender
            time.sleep(0.5)  # no event shows that it was ignored
            print(request.signal == signal.SIGUSR1, flush=True)
            stop.REPEAT_SECONDS = 0.0
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=send, daemon=True).start()
        ctypes.CDLL(None).sleep(20)
        ctypes.CDLL(None).sleep(20)  # a signal would end the first
        print("still there")
    """
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "True\n"
    assert result.returncode == 128 + signal.SIGTERM
    assert "SIGUSR1: stopping within two more steps" in result.stderr


def test_a_trainer_that_cannot_be_built_listens_no_more(train):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    class Broken(SuperpositionTrainer):
        def init_distributed(self):
            raise ValueError("no network")

    with pytest.raises(ValueError, match="no network"):
        train(trainer_class=Broken)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_children_survive_a_signal_to_every_process(tmp_path):
    """As Slurm sends it; they are needed for the last step and its checkpoint."""
    command = [sys.executable, ROOT / "tests" / "stop_children.py", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert result.stdout.endswith("done\n"), result.stdout + result.stderr
    assert result.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_to_every_process_of_a_job(base_args, tmp_path, number):
    """With a process for checkpoints and one for data; both have to do with the last checkpoint."""
    run = tmp_path / "run"
    job = [*base_args, *ON, *SAVE, "--training.steps=20000", f"--job.dump_folder={run}"]
    job += ["--checkpoint.interval=20", "--checkpoint.async_mode=async_with_pinned_mem"]
    job += ["--training.dataloader.num_workers=1"]
    rank = [str(ROOT / "tests" / "checkpoint_process.py"), *job]
    code, output = signal_every_process(rank, run, number)
    assert code == STOPPED_EXIT_CODE, output
    last = inventory.list_checkpoints(run / "checkpoint")[-1].path
    assert f"Stopped after step {last.name.removeprefix('step-')} " in output
    assert manifests.damages(last, manifests.read_manifest(last)["files"]) == []


# who leaves the step out: the fused optimizer, or the host before it
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["fused", "foreach"])


@pytest.mark.parametrize(
    ("step", "phase", "what", "implementation"),
    [
        (2, "superposition", "loss", "fused"),
        (2, "superposition", "gradient", "foreach"),
        (5, "recovery", "loss", "foreach"),
        (5, "recovery", "gradient", "fused"),
    ],
)
def test_a_step_that_is_not_finite_stops_the_run(
    train, tmp_path, implementation, what, step, phase
):
    job = (*ON, *SAVE, f"--optimizer.implementation={implementation}")
    with pytest.raises(NonFiniteError) as error:
        train(*job, trainer_class=poisoned_at(step, what=what))
    message = str(error.value)
    assert f"step {step} ({phase} phase)" in message
    assert ("not finite on ranks [0]" if what == "loss" else "gradient norm inf") in message
    assert "optimizer.lr" in message
    assert inventory.complete_steps(tmp_path / "run" / "checkpoint")[-1] == step - 1


@pytest.mark.parametrize("step", [2, 6])
def test_a_step_that_is_not_finite_is_known_one_step_later(train, caplog, step):
    """Where nothing else has to know; the last one at the end."""
    caplog.set_level("INFO")
    with pytest.raises(NonFiniteError, match=rf"step {step} \("):
        train(*ON, trainer_class=poisoned_at(step))
    assert f"step: {step:2} " in caplog.text
    assert f"step: {step + 1:2} " not in caplog.text


def test_a_step_that_is_not_finite_where_the_data_end(train, tmp_path):
    short = write_shards(tmp_path / "short", [[[n % 1000 for n in range(2 * 4 * 33)]]])
    args = ("--training.dataset=token_shards", f"--training.dataset_path={short}")
    with pytest.raises(NonFiniteError, match="step 2 "):
        train(*args, "--token_shards.at_end=stop", trainer_class=poisoned_at(2))


@IMPLEMENTATIONS
def test_steps_may_be_skipped(train, tmp_path, implementation):
    allowed = "--resilience.max_skipped_steps=2"
    job = (*ON, *SAVE, allowed, f"--optimizer.implementation={implementation}")
    lines = train(*job, trainer_class=poisoned_at(2, 4, what="gradient"))
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 2, 2, 2]
    folder = tmp_path / "run" / "checkpoint"
    for before, after, same in [(1, 2, True), (2, 3, False), (3, 4, True), (4, 5, False)]:
        before, after = (load_full(folder / f"step-{step}") for step in (before, after))
        assert all(torch.equal(before[key], after[key]) for key in before) is same
    # the count goes on in a resumed run
    for step in (5, 6):
        shutil.rmtree(folder / f"step-{step}")
    with pytest.raises(NonFiniteError, match="2 steps were skipped before"):
        train(*job, trainer_class=poisoned_at(5))


def test_values_of_simulated_ranks_mean_nothing(train, monkeypatch):
    """torch 2.11's fake process group leaves reduced gradients as memory was."""
    monkeypatch.setenv("NGPU", "2")
    lines = train(*ON, "--comm.mode=fake_backend", trainer_class=poisoned_at(2, 5))
    assert len(lines) == 6


LAUNCH = "torchtitan.experiments.tst.launch"
ON_THIS_NODE = ("--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_launch_passes_signals_on_and_gives_the_exit_code(tmp_path, number):
    """Sent to the launcher; torchrun itself would kill the rank, and end with 1."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, pathlib, signal, sys, time\n"
        "me = pathlib.Path(__file__).with_name(os.environ['RANK'])\n"
        "def stop(number, frame):\n"
        "    time.sleep(0.5)\n"  # as for a checkpoint
        "    me.write_text(str(number))\n"
        "    while not all(me.with_name(name).read_text() for name in '01'):\n"
        "        time.sleep(0.01)\n"  # a rank that has stopped has seen all others do so
        f"    sys.exit({STOPPED_EXIT_CODE})\n"
        "signal.signal(int(sys.argv[1]), stop)\n"
        "me.touch()\n"
        "time.sleep(60)\n"
    )
    args = ["--nproc_per_node=2", *ON_THIS_NODE, str(rank), str(int(number))]
    launcher = launches.start(LAUNCH, args, tmp_path / "launcher")
    launches.wait_until(lambda: all((tmp_path / name).exists() for name in "01"))
    os.kill(launcher.pid, number)
    launcher.join(60)
    assert launcher.exitcode == STOPPED_EXIT_CODE
    assert [(tmp_path / name).read_text() for name in "01"] == [str(int(number))] * 2
    shown = "".join(path.read_text() for path in (tmp_path / "launcher").iterdir())
    assert "failed (exitcode" not in shown  # to stop is not to fail


def handles(pid, number):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1


@pytest.mark.parametrize("moment", ["rendezvous", "imports"])
def test_launch_that_is_stopped_before_it_trains(tmp_path, moment):
    """Nothing is lost, and the batch script knows that it may queue the job again."""
    rank, port = tmp_path / "rank.py", free_port()
    rank.write_text(f"open('{tmp_path / 'started'}', 'w'); import time; time.sleep(60)")
    args = ["--nnodes=2" if moment == "rendezvous" else "--nnodes=1", "--rdzv_backend=c10d"]
    args += [f"--rdzv_endpoint=localhost:{port}", str(rank)]
    launcher = launches.start(LAUNCH, args, tmp_path / "launcher")
    if moment == "imports":
        launches.wait_until((tmp_path / "started").exists)
    else:  # it waits for another node
        launches.wait_until(lambda: listens(port) and handles(launcher.pid, signal.SIGUSR1))
    os.kill(launcher.pid, signal.SIGUSR1)
    launcher.join(60)
    assert launcher.exitcode == STOPPED_EXIT_CODE


def listens(port):
    with socket.socket() as s:
        return s.connect_ex(("localhost", port)) == 0


def launch_with_a_signal_pending(args):
    """As start.py leaves the signals, with one that has come since."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.kill(os.getpid(), signal.SIGUSR1)
    launches.run_module(LAUNCH, args)


def test_launch_that_is_stopped_before_it_listens(tmp_path):
    rank = tmp_path / "rank.py"
    rank.write_text(f"open('{tmp_path / 'started'}', 'w')")
    log = ranks.run_ranks(
        launch_with_a_signal_pending, 1, tmp_path / "launcher", [*ON_THIS_NODE, str(rank)]
    )
    assert log.startswith(f"rank 0 ended with {STOPPED_EXIT_CODE}\n")
    assert not (tmp_path / "started").exists()


def launch_in(environment, args):
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value:
            os.environ[name] = value
    launches.run_module(LAUNCH, args)


@pytest.mark.parametrize("given", [None, "max_split_size_mb:64"])
def test_launch_keeps_memory_in_one_piece_unless_told_otherwise(tmp_path, given):
    rank, name = tmp_path / "rank.py", "PYTORCH_ALLOC_CONF"
    rank.write_text(f"import os; open('{tmp_path / 'found'}', 'w').write(os.environ['{name}'])")
    args = [*ON_THIS_NODE, str(rank)]
    assert not ranks.run_ranks(launch_in, 1, tmp_path / "launcher", {name: given}, args)
    assert (tmp_path / "found").read_text() == (given or "expandable_segments:True")


def test_launch_does_not_start_again(tmp_path):
    result = launches.fork(LAUNCH, ["--max-restarts=1", "rank.py"], 1, tmp_path)
    assert result.failed
    assert "--max-restarts" in result.output


def test_launch_gives_other_failures_as_torchrun_does(tmp_path):
    (tmp_path / "rank.py").write_text("raise SystemExit(3)")
    result = launches.fork(LAUNCH, [*ON_THIS_NODE, str(tmp_path / "rank.py")], 1, tmp_path)
    assert result.failed
    assert "exitcode  : 3" in result.output


def test_manifest_is_plain_json(whole):
    manifest = json.loads((whole.checkpoints / "boundary" / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert manifest["files"][".metadata"]["bytes"] > 0
