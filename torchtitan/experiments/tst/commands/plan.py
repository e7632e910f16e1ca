"""Estimate what a job costs: steps, tokens, FLOPs, GPU hours, memory, data.

    tst plan train_configs/paper/3B-20k-tst.toml
    tst plan JOB.toml --gpu H100 --ranks 32 --mfu 0.35 --plot plan.png
    tst plan JOB.toml --layouts --gpu B200 --ranks 64

Prints the estimates of one job, and what the paper found at its size. With --layouts, it lists the
degrees of parallelism that the job could have on these GPUs, with the memory and communication of
each. It needs the config only, no GPU and no tokenizer. Data is counted if it is there. For many
jobs, one line each, use tst dry-run. Further arguments override the TOML.
"""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ..checks.job import check_config
from ..config.manager import SuperpositionConfigManager
from ..errors import ArgumentError
from ..planning.layouts import Machine, layouts_of
from ..planning.layouts_table import table
from ..planning.plan import GPUS, default_ranks, make_plan
from ..planning.summary import ASSUMED_MFU, memory_lines, nearest_surface, summary
from .arguments import PLOT_SUFFIXES, GpuKind, Job, Ranks, check_positive, job_arguments


def main(
    overrides: list[str],
    job: Job,
    /,
    ranks: Ranks = None,
    gpu: GpuKind = "B200",
    mfu: Annotated[float | None, arg(metavar="SHARE")] = None,
    memory: bool = True,
    plot: Annotated[Path | None, arg(metavar="PNG")] = None,
    layouts: bool = False,
    rows: int = 10,
    gpus_per_node: int = 8,
) -> None:
    """Estimate a job.

    Args:
        overrides: Arguments of the job.
        job: The job's TOML file.
        ranks: Number of GPUs.
        gpu: Kind of GPU.
        mfu: Model FLOPs utilization, in (0, 1].
            By default that of the paper's GPU hours for the
            paper's models, and 0.4 for others.
        memory: Estimate the memory with a dry run.
        plot: Draw the paper's losses around the job into this file.
        layouts: List the layouts that TorchTitan accepts and that fit, the fastest first.
        rows: Number of layouts to list.
        gpus_per_node: Number of GPUs that NVLink connects, for the layouts.
    """
    check_positive(**{"ranks": ranks, "rows": rows, "gpus-per-node": gpus_per_node})
    if mfu is not None and not 0 < mfu <= 1:
        raise ArgumentError(f"--mfu {mfu}: must be in (0, 1]")
    if plot and plot.suffix not in PLOT_SUFFIXES:
        raise ArgumentError(f"--plot {plot}: must end with one of {', '.join(PLOT_SUFFIXES)}")
    config = SuperpositionConfigManager().parse_args(job_arguments(job, overrides))
    ranks = ranks or default_ranks(config)
    if layouts:
        machine = Machine(GPUS[gpu], ranks, gpus_per_node, mfu or ASSUMED_MFU)
        print("\n".join(table(config, layouts_of(config, machine), machine, rows)))
        return
    check_config(config, ranks)
    of_memory = memory_lines(config, ranks, GPUS[gpu]) if memory else []
    plan = make_plan(config, ranks)
    print("\n".join(summary(config, plan, GPUS[gpu], mfu, of_memory)))
    if plot:
        from ..planning.surface_plots import draw_surfaces

        surface = nearest_surface(config, plan)
        mark = plan.mean_bag_size if plan.superposition else None
        draw_surfaces({f"paper: {surface.title}": surface}, plot, mark=mark)
        print(f"Plot: {plot}")
