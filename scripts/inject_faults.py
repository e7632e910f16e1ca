"""Kill and stop a run at random moments, resume it, and compare it with an undisturbed run.

    python scripts/inject_faults.py --kills 50 --stops 20                 one long run
    python scripts/inject_faults.py --kills 50 --per-run 10 --steps 36    several short ones

A kill (SIGKILL) hits one random rank or all of them: between two steps, in a save, around a change
of the bag size (from stage to stage, or at the boundary), or while a launch starts. A stop is
SIGTERM or SIGUSR1 to one random rank, or to every process of the launch, as Slurm does. After a
stop, the launch must end with the exit code of a stopped run, and with a complete checkpoint of the
step that it names. The runs train the demo's small model on its corpus, with two stages. Every
batch that any launch reads, every loss and gradient norm that it logs, and the final weights and
optimizer state must be those of the undisturbed run, bit for bit.
"""

import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchtitan.experiments.tst.testing.processes import signal_tree
from torchtitan.experiments.tst.testing.states import read_state

INTERVAL = 4  # steps from checkpoint to checkpoint
LAUNCH_SECONDS = 8.0  # approximate time until the first step
DATASETS = {"jsonl": "train.jsonl", "token_shards": "tokens"}  # paths in the corpus
MOMENTS = ("step", "save", "change", "start")
ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> dict[str, int]:
    """Inject faults, and return their number by kind. Exit if a run differs."""
    options = parse(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    corpus = options.corpus or options.folder / "corpus"
    if not corpus.exists():
        from torchtitan.experiments.tst.data.demo_corpus import make_corpus, read_sources

        make_corpus(corpus, list(read_sources())[:300])
    if options.dataset == "token_shards" and not (corpus / "tokens").exists():
        source, tokenizer = corpus / "train.jsonl", corpus / "tokenizer"
        tst = [sys.executable, "-m", "torchtitan.experiments.tst"]
        command = [*tst, "tokenize", source, corpus / "tokens", "--tokenizer", tokenizer]
        subprocess.run(command, check=True)
    chance = random.Random(options.seed)
    undisturbed = options.folder / "undisturbed"
    shutil.rmtree(undisturbed, ignore_errors=True)
    finish(launch(undisturbed, corpus, options), undisturbed)
    counts: collections.Counter[str] = collections.Counter()
    run = 0
    faults = [kill_ranks] * options.kills + [stop] * options.stops
    chance.shuffle(faults)
    while faults:
        run += 1
        folder = options.folder / f"disturbed-{run}"
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(min(options.per_run, len(faults))):
            process = launch(folder, corpus, options)
            hit = faults[0](process, folder, chance, options)
            if hit is None:  # the run ended first; the fault is the next run's
                break
            del faults[0]
            counts[hit] += 1
            print(
                f"run {run}, fault {sum(counts.values())} of {options.kills + options.stops}: "
                f"{hit}; logged to step {last_step(folder)}, checkpoints {complete_steps(folder)}",
                flush=True,
            )
        finish(launch(folder, corpus, options), folder)
        compare(undisturbed, folder, options)
        print(f"run {run} is the undisturbed one, bit for bit", flush=True)
    print(json.dumps(counts, indent=2))
    return dict(counts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="number of kills")
    parser.add_argument("--stops", type=int, default=20, help="number of stops")
    parser.add_argument("--per-run", type=int, help="kills and stops in one run (default: all)")
    parser.add_argument("--steps", type=int, help="steps of a run (default: enough for its faults)")
    parser.add_argument("--processes", type=int, default=2, help="number of ranks")
    parser.add_argument("--async-mode", default="disabled", help="checkpoint.async_mode")
    parser.add_argument("--dataset", choices=DATASETS, default="jsonl", help="training.dataset")
    parser.add_argument("--workers", type=int, default=0, help="training.dataloader.num_workers")
    parser.add_argument(
        "--moments", nargs="+", choices=MOMENTS, default=MOMENTS, help="moments of kills"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of moments and targets")
    parser.add_argument(
        "--corpus",
        type=Path,
        help="folder with train.jsonl and tokenizer (default: the demo's corpus is made)",
    )
    parser.add_argument("--folder", type=Path, help="folder of the runs (default: a temporary one)")
    options = parser.parse_args(arguments)
    options.per_run = options.per_run or options.kills + options.stops
    options.steps = options.steps or 24 + 3 * options.per_run
    boundary = options.steps // 3 | 1  # odd, so that it has no other checkpoint
    options.changes = (boundary // 2 | 1, boundary)
    options.folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    return options


def launch(folder: Path, corpus: Path, options: argparse.Namespace) -> subprocess.Popen:
    """Start or resume the run, in its own session."""
    of_stage, boundary = options.changes
    job = {
        "job.dump_folder": folder,
        "model.name": "llama3",
        "model.flavor": "demo",
        "model.hf_assets_path": corpus / "tokenizer",
        "superposition.bag_size": "4,2",
        "superposition.steps": f"{of_stage},{boundary - of_stage}",
        "training.dataset": options.dataset,
        "training.dataset_path": corpus / DATASETS[options.dataset],
        "training.dataloader.num_workers": options.workers,
        "training.seq_len": 32,
        "training.local_batch_size": 4,
        "training.steps": options.steps,
        "training.mixed_precision_param": "float32",
        "lr_scheduler.warmup_steps": 2,
        "activation_checkpoint.mode": "none",
        "metrics.log_freq": 1,
        "checkpoint.interval": INTERVAL,
        "checkpoint.keep_latest_k": 3,
        "checkpoint.async_mode": options.async_mode,
        "debug.seed": 0,
    }
    arguments = [f"--{key}={value}" for key, value in job.items()]
    arguments += ["--checkpoint.enable", "--checkpoint.no-last-save-model-only"]
    arguments.append("--superposition.checkpoint_each_stage")
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("pid-*"):
        path.unlink()
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "torchtitan.experiments.tst.launch"),
                *(f"--nproc_per_node={options.processes}", "--rdzv_backend=c10d"),
                *("--rdzv_endpoint=localhost:0", __file__, *arguments),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", WORKER: "1"},
            cwd=ROOT,
            start_new_session=True,
        )


def kill_ranks(
    process: subprocess.Popen, folder: Path, chance: random.Random, options: argparse.Namespace
) -> str | None:
    """Wait for a random moment and kill. Return what was hit; None if the run had ended."""
    done, begin = last_step(folder), time.time()
    moments = list(options.moments)
    ahead = [step for step in options.changes if 0 <= step - done <= 4 * INTERVAL]
    if "change" in moments and not ahead:
        moments.remove("change")
    moment = chance.choice(moments or ["step"])
    if moment == "start":
        time.sleep(chance.uniform(0, LAUNCH_SECONDS))
    elif moment == "save":
        saves = chance.randint(1, 2)
        while process.poll() is None and saves:
            seen = saving(folder)
            if seen:
                saves -= 1
            while saves and process.poll() is None and saving(folder) == seen:
                time.sleep(0.0005)
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.1))
    else:
        step = done + chance.randint(1, 2 * INTERVAL)
        if moment == "change":
            step = chance.choice(ahead) - 1
        while process.poll() is None and last_step(folder) < min(step, options.steps - 2):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.3 if moment == "change" else 0.05))
    pids = [int(path.read_text() or 0) for path in sorted(folder.glob("pid-*"))]
    if process.poll() is not None:
        return None
    in_save = " (in a save)" if saving(folder, since=begin) else ""
    if pids and all(pids) and chance.random() < 0.5:
        target = chance.randrange(len(pids))
        kill(pids[target])
        wait(process)
        return f"kill one rank: {moment}{in_save}"
    for pid in [process.pid, *pids]:
        kill(pid)
    wait(process)
    time.sleep(0.2)  # a process that was just starting may not have written its PID
    for path in folder.glob("pid-*"):
        kill(int(path.read_text() or 0))
    return f"kill all ranks: {moment}{in_save}"


def stop(
    process: subprocess.Popen, folder: Path, chance: random.Random, options: argparse.Namespace
) -> str | None:
    """Wait for a random step, send a signal, and check the exit code and the checkpoint."""
    from torchtitan.experiments.tst.resilience.checkpoint import inventory, manifests
    from torchtitan.experiments.tst.resilience.stop import STOP_SIGNALS, STOPPED_EXIT_CODE

    step = min(last_step(folder) + chance.randint(1, 5), options.steps - 4)
    while process.poll() is None and last_step(folder) < step:
        time.sleep(0.002)
    if process.poll() is not None:
        return None
    number, rank = chance.choice(STOP_SIGNALS), chance.randrange(options.processes + 1)
    if everywhere := rank == options.processes:
        signal_tree(process.pid, number)
    else:
        os.kill(int((folder / f"pid-{rank}").read_text()), number)
    wait(process)
    output = (folder / "output.txt").read_text()
    reports = re.findall(r"Stopped after step (\d+)", output)
    if process.returncode != STOPPED_EXIT_CODE or not reports:
        sys.exit(f"{number.name}: exit code {process.returncode}, output:\n{output[-5000:]}")
    checkpoint = inventory.step_folder(folder / "checkpoint", int(reports[-1]))
    manifest = manifests.read_manifest(checkpoint)
    if manifest is None:
        sys.exit(f"{number.name}: {checkpoint} does not exist")
    if damages := manifests.damages(checkpoint, manifest["files"]):
        sys.exit(f"{number.name}: {checkpoint} is not complete: {damages}")
    return f"stop: {number.name}{' to every process' if everywhere else ''}"


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        if pid:
            os.kill(pid, signal.SIGKILL)


def wait(process: subprocess.Popen) -> None:
    process.wait(timeout=120)
    while subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).stdout:
        time.sleep(0.05)


def finish(process: subprocess.Popen, folder: Path) -> None:
    if process.wait(timeout=600):
        sys.exit(f"the run in {folder} failed:\n{(folder / 'output.txt').read_text()[-5000:]}")


def saving(folder: Path, since: float = 0.0) -> list[str]:
    """Return the saves that are running or were killed, if they are newer than ``since``."""
    found = []
    for path in (folder / "checkpoint").glob("saving-*"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime >= since:
                found.append(path.name)
    return sorted(found)


def complete_steps(folder: Path) -> list[int]:
    from torchtitan.experiments.tst.resilience.checkpoint import inventory

    return inventory.complete_steps(folder / "checkpoint")


def last_step(folder: Path) -> int:
    return max((line["step"] for line in lines_of(folder / "metrics.jsonl")), default=0)


def lines_of(path: Path) -> list[dict]:
    """Return the lines of a JSON lines file, except those that a kill has cut off."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def compare(undisturbed: Path, disturbed: Path, options: argparse.Namespace) -> None:
    """Exit unless the runs are the same."""
    for name in ["metrics.jsonl", *(f"data-{rank}.jsonl" for rank in range(options.processes))]:
        keys = ("loss_metrics/global_avg_loss", "grad_norm", "n_tokens_seen", "checksum")
        expected, found = (
            [(line["step"], [line.get(key) for key in keys]) for line in lines_of(folder / name)]
            for folder in (undisturbed, disturbed)
        )
        steps = set(range(1, options.steps + 1))
        if len(expected) != options.steps or {step for step, _ in found} != steps:
            sys.exit(f"{name}: a step is missing in one of the runs")
        for step, values in found:  # of every launch, including steps that were lost
            if values != dict(expected)[step]:
                sys.exit(f"{name}: step {step} differs: {values}, not {dict(expected)[step]}")
    for step in (*options.changes, options.steps):
        expected, found = (
            read_state(folder / "checkpoint" / f"step-{step}")
            for folder in (undisturbed, disturbed)
        )
        different = [key for key in expected if not same(expected[key], found.get(key))]
        if different:
            sys.exit(f"the checkpoints of step {step} differ in {different}")


def same(a: Any, b: Any) -> bool:
    return a.equal(b) if hasattr(a, "equal") else a == b


WORKER = "INJECT_FAULTS_WORKER"


def work() -> None:
    """Run a rank that writes its process ID and a checksum of every batch to files."""
    folder = Path(next(a for a in sys.argv if a.startswith("--job.dump_folder=")).split("=")[1])
    rank = os.environ["RANK"]
    (folder / f"pid-{rank}").write_text(str(os.getpid()))

    import xxhash

    from torchtitan.experiments.tst import train
    from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

    class Trainer(SuperpositionTrainer):
        def batch_generator(self, data_iterable):
            with (folder / f"data-{rank}.jsonl").open("a", buffering=1) as file:
                for input_dict, labels in super().batch_generator(data_iterable):
                    checksum = xxhash.xxh3_128(input_dict["input"].numpy())
                    checksum.update(labels.contiguous().numpy())
                    line = {"step": self.step, "checksum": checksum.hexdigest()}
                    file.write(json.dumps(line) + "\n")
                    yield input_dict, labels

    train.SuperpositionTrainer = Trainer
    train.main()


if __name__ == "__main__":
    if os.environ.get(WORKER):
        work()
    else:
        main()
