r"""Try jobs without their hardware: layout, batch and memory, at any number of GPUs.

    python scripts/dry_run.py train_configs/paper/*.toml
    python scripts/dry_run.py train_configs/paper/3B-20k-tst.toml --gpus 16 -- \
        --parallelism.data_parallel_shard_degree=16 --training.local_batch_size=16

The real trainer is built as rank 0 of all ranks and plays a step of each phase on tensors without
content. Each job has a line; exits with 1 if one cannot run, does not fit or could not be tried.
"""

import logging
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all GPUs are played on the CPU

from command_line import documented_parser
from torchtitan.experiments.tst.device import enable_cpu_if_alone

enable_cpu_if_alone()

from torchtitan.experiments.tst import models  # noqa: E402, F401
from torchtitan.experiments.tst.config.errors import in_one_line  # noqa: E402
from torchtitan.experiments.tst.data import datasets  # noqa: E402, F401
from torchtitan.experiments.tst.job_config import (  # noqa: E402
    SuperpositionConfigManager,
)
from torchtitan.experiments.tst.planning.dry_run import dry_run  # noqa: E402
from torchtitan.experiments.tst.planning.plan import (  # noqa: E402
    GPUS,
    Gpu,
    default_ranks,
    make_plan,
    positive,
)

RESERVE = 0.1  # of the memory: for the CUDA context, NCCL's buffers and fragmentation


def describe(arguments: list[str], ranks: int | None, gpu: Gpu, play: bool) -> tuple[str, bool]:
    """What came of a job, and whether it fits.

    Raises:
        ValueError: if it cannot run.
    """
    config = SuperpositionConfigManager().parse_args(arguments)
    ranks = ranks or default_ranks(config)
    run = dry_run(config, ranks, play)
    plan = make_plan(config, ranks)
    mesh = ", ".join(f"{name} {size}" for name, size in run.mesh.items()) or "no parallelism"
    text = (
        f"{ranks} {gpu.name} ({mesh}), {plan.sequences:,} sequences = {plan.data_parallel_ranks} x "
        f"{plan.local_batch_size} x {run.accumulation}"
    )
    if run.untraced and play:
        return f"{text}; {run.untraced}", True
    if run.left_out and play:
        text += f" (without {', '.join(run.left_out)})"
    peaks = {phase: memory.peak for phase, memory in run.memory.items()}
    fits = all(peak <= (1 - RESERVE) * gpu.memory for peak in peaks.values())
    for phase, peak in peaks.items():
        text += f"; {phase} {peak / 1e9:.1f} GB"
    if not fits:
        text += f": TOO MUCH for {gpu.memory / 1e9:.0f} GB less {100 * RESERVE:.0f} %"
    return text, fits


def attempt(*job: Any) -> tuple[str, bool]:
    """As :func:`describe`, and what keeps the job from being tried."""
    try:
        return describe(*job)
    except (ValueError, OSError) as error:
        return f"CANNOT RUN: {error}", False
    except (Exception, SystemExit) as error:  # a fault, and not one of the next job
        return f"COULD NOT BE TRIED: {in_one_line(error)}", False


def in_a_process(*job: Any) -> tuple[str, bool]:
    """As :func:`attempt`, in a process of its own: torch keeps meshes and rules of each job."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(attempt, *job).result()
        except BrokenProcessPool:
            return "COULD NOT BE TRIED: its process was killed; is there enough memory?", False


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("configs", nargs="+", metavar="JOB.toml")
    parser.add_argument(
        "--gpus", type=positive, metavar="N", help="default: those of the config's [parallelism]"
    )
    parser.add_argument("--gpu", choices=GPUS, default="B200", help="default: %(default)s")
    parser.add_argument("--no-memory", action="store_true", help="build, but play no step: faster")
    arguments, overrides = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, overrides = arguments[:at], arguments[at + 1 :]
    args = parser.parse_args(arguments)
    logging.getLogger().setLevel(logging.CRITICAL)  # torchtitan's: that there is no tokenizer
    failed = 0
    for number, config in enumerate(args.configs, 1):
        begin = time.perf_counter()
        job = [f"--job.config_file={config}", *overrides]
        text, fits = in_a_process(job, args.gpus, GPUS[args.gpu], not args.no_memory)
        failed += not fits
        seconds = time.perf_counter() - begin
        print(f"[{number}/{len(args.configs)}] {config}: {text} ({seconds:.0f} s)", flush=True)
    if failed:
        sys.exit(f"{failed} of {len(args.configs)} jobs cannot run, do not fit or were not tried")


if __name__ == "__main__":
    main()
