"""What a run will cost, from its config alone: steps, tokens, FLOPs, hours, memory, data.

    python scripts/plan.py --job.config_file train_configs/paper/3B-20k-tst.toml
    python scripts/plan.py --gpu H100 --gpus 32 --mfu 0.35 --plot plan.png --job.config_file JOB

Nothing is needed but the config: no GPU, no tokenizer; data are counted if they are there.
"""

import argparse
import logging
import math
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the dry run plays all GPUs on the CPU

from torchtitan.experiments.tst.device import enable_cpu_if_alone

enable_cpu_if_alone()

from torchtitan.experiments.tst import models  # noqa: E402, F401
from torchtitan.experiments.tst.config.errors import ConfigError, in_one_line  # noqa: E402
from torchtitan.experiments.tst.data import datasets  # noqa: E402, F401
from torchtitan.experiments.tst.job_checks import check_config  # noqa: E402
from torchtitan.experiments.tst.job_config import (  # noqa: E402
    JobConfig,
    Superposition,
    SuperpositionConfigManager,
    superposition_section,
)
from torchtitan.experiments.tst.planning import paper  # noqa: E402
from torchtitan.experiments.tst.planning.dry_run import dry_run  # noqa: E402
from torchtitan.experiments.tst.planning.plan import (  # noqa: E402
    GPUS,
    Gpu,
    Plan,
    count,
    default_ranks,
    describe_data,
    make_plan,
    mfu_of_paper,
    positive,
)

ASSUMED_MFU = 0.4


def table(plan: Plan, gpu: Gpu, mfu: float) -> list[str]:
    phases = [phase for phase in plan.phases if phase.steps]
    wholes = [*phases, plan] if len(phases) > 1 else phases
    hours_per_flop = plan.gpu_hours(gpu, mfu) / plan.flops
    rows: list[tuple[str, list[str]]] = [
        ("", [*(str(phase.phase) for phase in phases), "total"][: len(wholes)]),
        ("steps", [f"{x.steps:,}" for x in wholes]),
        ("bag size", [f"{phase.bag_size}" for phase in phases]),
        ("data tokens a step", [f"{phase.data_tokens_per_step:,}" for phase in phases]),
        ("latents a step", [f"{phase.latents_per_step:,}" for phase in phases]),
        ("FLOPs a step", [f"{phase.flops_per_step:.3e}" for phase in phases]),
        ("data tokens", [count(x.data_tokens) for x in wholes]),
        ("latents", [count(x.latents) for x in wholes]),
        (f"{gpu.name} hours", [f"{hours_per_flop * x.flops:,.1f}" for x in wholes]),
        (
            f"hours on {plan.ranks}",
            [f"{hours_per_flop * x.flops / plan.ranks:,.1f}" for x in wholes],
        ),
    ]
    return [f"  {name:20}" + "".join(f"{cell:>16}" for cell in cells) for name, cells in rows]


def memory(config: JobConfig, ranks: int, gpu: Gpu) -> list[str]:
    """The memory of a step of each phase, or why it is not estimated.

    Raises:
        ConfigError: if the job cannot run.
    """
    try:
        run = dry_run(config, ranks)
    except ConfigError:
        raise
    except Exception as error:  # a fault, without which there is a plan all the same
        return [f"could not be estimated: {in_one_line(error)}"]
    if run.untraced:
        return [run.untraced]
    left_out = [f"without {key}, which changes it" for key in run.left_out]
    return [
        f"{of_phase.peak / 1e9:.1f} GB of {gpu.memory / 1e9:.0f} GB on each GPU at the fullest "
        f"moment of a {phase} step: {of_phase.parameters / 1e9:.1f} parameters, "
        f"{of_phase.gradients / 1e9:.1f} gradients, {of_phase.optimizer / 1e9:.1f} optimizer, "
        f"{of_phase.rest / 1e9:.1f} activations and other"
        for phase, of_phase in run.memory.items()
    ] + left_out


def advice(section: Superposition, plan: Plan, surface: paper.Surface) -> list[str]:
    """The paper's good range for this size, and its losses around the config's values."""
    model = paper.nearest_model(plan.parameters)
    (low, high), (least, most) = paper.GOOD_BAG_SIZES[model], paper.GOOD_STEP_RATIOS
    bag_sizes = f"s = {low}" if low == high else f"s from {low} to {high}"
    best = min(surface.losses, key=surface.losses.__getitem__)
    lines = [
        f"at {model}, the nearest size: {bag_sizes}, r from {least} to {most}",
        f"final loss at {surface.title} weighting: "
        f"baseline {surface.baseline}, best {surface.losses[best]} at r = {best[0]}, s = {best[1]}",
    ]
    s, ratio = section.bag_size, plan.phases[0].steps / plan.steps
    columns = [size for size in surface.bag_sizes if abs(size - max(s, 2)) <= 2]
    if s > 1 and columns:
        lines.append("    r \\ s" + "".join(f"{size:>8}" for size in columns))
        nearest = min(surface.ratios, key=lambda r: abs(r - ratio))
        lines += [
            f"    {r:<5}"
            + "".join(f"{surface.losses.get((r, size), math.nan):8.4f}" for size in columns)
            for r in surface.ratios
            if abs(r - nearest) < 0.15
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="All other arguments are the job's: --job.config_file JOB.toml ...",
    )
    parser.add_argument("--gpu", choices=GPUS, default="B200", help="default: %(default)s")
    parser.add_argument(
        "--gpus", type=positive, metavar="N", help="default: those of the config's [parallelism]"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        help="share of the GPU's peak in (0, 1]; default: what the paper's hours come to, for its "
        f"models; else {ASSUMED_MFU}",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the dry run")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="the paper's losses around it")
    args, job_args = parser.parse_known_args()
    logging.getLogger().setLevel(logging.ERROR)  # torchtitan's: that there is no tokenizer
    if args.mfu is not None and not 0 < args.mfu <= 1:
        parser.error(f"--mfu {args.mfu}: must be in (0, 1]")
    gpu = GPUS[args.gpu]
    try:
        config = SuperpositionConfigManager().parse_args(job_args)
        ranks = args.gpus or default_ranks(config)
        check_config(config, ranks)
        memory_lines = [] if args.no_memory else memory(config, ranks, gpu)
        plan = make_plan(config, ranks)
    except (ValueError, OSError) as error:
        sys.exit(f"config error: {error}")
    of_paper = mfu_of_paper(config, plan)
    mfu = args.mfu or of_paper or ASSUMED_MFU
    source = "given" if args.mfu else "the paper's, on B200" if of_paper else "assumed"
    print(
        f"{config.model.name} {config.model.flavor}, {plan.parameters:,} parameters, on {ranks} "
        f"{gpu.name} at {100 * mfu:.0f} % MFU ({source})"
    )
    print("\n".join(table(plan, gpu, mfu)))
    print(
        f"Batch: {plan.sequences:,} sequences = {plan.data_parallel_ranks} ranks x "
        f"{plan.local_batch_size} x {plan.accumulation} micro-batches"
    )
    if memory_lines:
        print("Memory: " + "\n        ".join(memory_lines))
    print("Data: " + "\n      ".join(describe_data(config, plan)))
    section = superposition_section(config)
    surface = paper.nearest_surface(plan.parameters, plan.steps, section.weighting)
    print("Paper: " + "\n       ".join(advice(section, plan, surface)))
    if args.plot:
        from plot_surface import draw_surfaces

        draw_surfaces(
            {f"paper: {surface.title}": surface},
            args.plot,
            mark=section.bag_size if section.bag_size > 1 else None,
        )
        print(f"Plot: {args.plot}")


if __name__ == "__main__":
    main()
