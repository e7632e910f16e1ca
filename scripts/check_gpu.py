"""Check whether this software is correct and fast on this machine's GPUs: scripts/check_gpu.sh.

It has these parts, each with its own time limit: the tests that need a GPU; a step of both phases
compared with TorchTitan's own, for the paper's 600M and 270M shapes, compiled, in bfloat16; the bag
loss compared with one cross-entropy; measured memory compared with the dry run. If a part fails,
its output and the other parts remain. No network and no corpus are needed. It writes report.md and
results.json, and a folder with log, tables and numbers for each part. The exit code is the number
of parts that failed or missed a target.
"""

import argparse
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from command_line import documented_parser
from gpu_report import ROOT, Outcome, Part, Target, machine, numbers_of, read, verdict, write_report
from torchtitan.experiments.tst.testing.processes import signal_tree

LOCAL_BATCH = 8
# Targets, on one H100 or H200
SUPERPOSITION, RECOVERY, BAG_LOSS, MEMORY = 1.03, 1.01, 1.25, 0.10


def parts(output: Path, gpus: int, tiny: bool) -> list[Part]:
    """Return all parts, in the order to run them in.

    Args:
        output: folder of the results.
        gpus: number of GPUs of this machine.
        tiny: whether to use shapes so small that a CPU computes a step in a second.
    """
    python, benchmark = sys.executable, "scripts/benchmark"
    small = ["--model.flavor=demo", "--training.seq_len=64", "--lm_head.chunks=2"] if tiny else []
    tests = [python, "-m", "pytest", "tests/test_gpu.py", "-m", "gpu and not slow", "-v"]
    tests += ["--durations=15"]
    tests += ["--collect-only"] if tiny else []
    launcher = [python]
    if gpus > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={gpus}"]

    def step(size: str, seconds: float) -> Part:
        options = ["--bag-sizes", "6", "16", "--local-batch-sizes", str(LOCAL_BATCH)]
        options += ["--rounds", "2" if tiny else "20"]
        options += [f"--job.config_file=train_configs/paper/{size}-20k-tst.toml", *small]
        options += ["--parallelism.data_parallel_shard_degree=-1"]
        name = f"step-{size}"
        return Part(
            name,
            f"A step of {size}, compiled, local batch {LOCAL_BATCH}",
            [*launcher, f"{benchmark}/step.py", *options, f"--output={output / name}"],
            seconds,
            step_targets,
            "step.txt",
        )

    shapes = ["--positions", "64", "128", "--vocab-size", "1000", "--width", "64"]
    loss = ["--bag-sizes", "1", "16", "--chunks", "8", "--rounds", "2" if tiny else "7"]
    loss += shapes if tiny else ["--positions", "4096", "16384"]
    memory = ["--ranks", "8", "--job.config_file=train_configs/paper/600M-20k-tst.toml", *small]
    memory += [f"--training.local_batch_size={LOCAL_BATCH}"]
    return [
        Part("tests", "Tests that need a GPU", tests, 200, test_targets, "log.txt"),
        step("600M", 120),
        step("270M", 80),
        Part(
            "loss",
            "The bag loss",
            [python, f"{benchmark}/loss.py", *loss, f"--output={output / 'loss'}"],
            80,
            loss_targets,
            "loss.txt",
        ),
        Part(
            "memory",
            "Memory of 600M as rank 0 of 8 under FSDP2, eager",
            [python, f"{benchmark}/memory.py", *memory, f"--output={output / 'memory'}"],
            60,
            memory_targets,
            "memory.txt",
        ),
    ]


def test_targets(folder: Path) -> list[Target]:
    """Return the figures of the tests from their log, which is there even after a time-out."""
    log = (folder / "log.txt").read_text()
    if "--collect-only" in log.partition("\n")[0]:
        return []
    results = re.findall(r"^\S+::.* (PASSED|FAILED|ERROR)\b", log, re.MULTILINE)
    passed = results.count("PASSED")
    return [
        Target("tests passed", passed, at_least=1),
        Target("tests failed", len(results) - passed, at_most=0),
    ]


def step_targets(folder: Path) -> list[Target]:
    """Return the figures of a step.

    MFU is compared to two digits, because that of the same trainer varies in the third.
    """
    (results,) = read(folder / "step.json")["by_batch"].values()
    times = {name: result["measurement"] for name, result in results.items()}
    recovery = ratio(times["recovery"], times["TorchTitan"])
    targets = [Target("recovery over TorchTitan", recovery, at_most=RECOVERY)]
    for name in results:
        if name.startswith("superposition"):
            over = ratio(times[name], times["recovery"])
            targets.append(Target(f"{name} over recovery", over, at_most=SUPERPOSITION))
        mfu, of_upstream = results[name]["mfu"], results["TorchTitan"]["mfu"]
        if name != "TorchTitan" and of_upstream:
            what = f"MFU of {name} over TorchTitan's"
            targets.append(Target(what, round((mfu or 0) / of_upstream, 2), at_least=1))
    return targets


def loss_targets(folder: Path) -> list[Target]:
    return [
        Target(
            f"bag loss over cross-entropy, {kind}, s = {size}",
            ratio(results["bag loss"], results["cross-entropy"]),
            at_most=BAG_LOSS,
        )
        for kind, by_size in read(folder / "loss.json")["loss_alone"].items()
        for size, results in by_size.items()
    ]


def memory_targets(folder: Path) -> list[Target]:
    return [
        Target(
            f"deviation of {phase} from the dry run",
            abs(peaks["measured"] / peaks["dry_run"] - 1),
            at_most=MEMORY,
        )
        for phase, peaks in read(folder / "memory.json")["peak_bytes"].items()
    ]


def ratio(measurement: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the median ratio over the rounds, as in the tables; NaN if one was out of memory."""
    pairs = list(zip(measurement["seconds"], other["seconds"], strict=False))
    return statistics.median(mine / theirs for mine, theirs in pairs) if pairs else math.nan


def run(part: Part, folder: Path, tiny: bool) -> Outcome:
    """Run a part within its time limit, with its output in ``log.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (folder / part.table, numbers_of(part, folder)):
        file.unlink(missing_ok=True)  # left by an earlier check
    outcome, begin = Outcome(part), time.monotonic()
    limit = part.seconds * (10 if tiny else 1)  # tiny shapes may run on a CPU
    with (folder / "log.txt").open("w") as log:
        print(shlex.join(part.command), file=log, flush=True)
        process = subprocess.Popen(part.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=limit)
            outcome.failure = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            outcome.failure = f"not finished after {limit:g} s"
        finally:
            if process.poll() is None:
                signal_tree(process.pid, signal.SIGKILL)
            process.wait()
    outcome.seconds = time.monotonic() - begin
    try:
        outcome.targets = part.targets(folder)
    except (OSError, ValueError, KeyError) as error:
        outcome.failure = outcome.failure or f"no figures: {error!r}"
    return outcome


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/check_gpu"),
        help="folder of the results; default: %(default)s",
    )
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="parts to run; default: all")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="only try the commands, with tiny shapes, also without a GPU",
    )
    args: argparse.Namespace = parser.parse_args()
    gpus = gpu_count()
    if not gpus and not args.tiny:
        sys.exit("No GPU found. To run the same commands with tiny shapes on CPU, add --tiny")
    output = args.output.absolute()
    todo = parts(output, gpus, args.tiny)
    if args.parts:
        names = [part.name for part in todo]
        if unknown := set(args.parts) - set(names):
            parser.error(f"--parts: no {', '.join(unknown)}; choose from {', '.join(names)}")
        todo = [part for part in todo if part.name in args.parts]
    about, outcomes = machine(), []
    output.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {part.title} (at most {part.seconds:g} s)", flush=True)
        outcome = run(part, output / part.name, args.tiny)
        outcomes.append(outcome)
        for target in outcome.targets:
            print(f"    {'  ' if args.tiny or target.met else '! '}{target}")
        print(f"    {verdict(outcome, args.tiny)}, {outcome.seconds:.0f} s", flush=True)
        write_report(output, about, outcomes, args.tiny)
    print(f"Written to {output}: report.md, results.json")
    sys.exit(sum(outcome.falls_short(args.tiny) for outcome in outcomes))


def gpu_count() -> int:
    """Return the number of GPUs without creating a context on them, which would take memory."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    main()
