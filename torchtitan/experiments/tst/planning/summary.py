"""A job's plan as text: what it costs, and what the paper found at its size."""

import math

from .. import paper
from ..config.job_config import JobConfig, superposition_section
from ..errors import ConfigError, in_one_line
from .dry_run import dry_run
from .numbers import count
from .plan import Gpu, Plan, StagePlan, describe_data, mfu_of_paper

ASSUMED_MFU = 0.4


def _table(plan: Plan, gpu: Gpu, mfu: float) -> list[str]:
    stages = plan.stages
    wholes: list[StagePlan | Plan] = [*stages, plan] if len(stages) > 1 else [*stages]
    hours_per_flop = plan.gpu_hours(gpu, mfu) / plan.flops
    rows: list[tuple[str, list[str]]] = [
        ("", [*(str(planned.stage.phase) for planned in stages), "total"][: len(wholes)]),
        ("steps", [f"{x.steps:,}" for x in wholes]),
        ("bag size", [f"{planned.stage.bag_size}" for planned in stages]),
        ("data tokens a step", [f"{planned.data_tokens_per_step:,}" for planned in stages]),
        ("latents a step", [f"{planned.latents_per_step:,}" for planned in stages]),
        ("FLOPs a step", [f"{planned.flops_per_step:.3e}" for planned in stages]),
        ("data tokens", [count(x.data_tokens) for x in wholes]),
        ("latents", [count(x.latents) for x in wholes]),
        (f"{gpu.name} hours", [f"{hours_per_flop * x.flops:,.1f}" for x in wholes]),
        (
            f"hours on {plan.ranks}",
            [f"{hours_per_flop * x.flops / plan.ranks:,.1f}" for x in wholes],
        ),
    ]
    return [f"  {name:20}" + "".join(f"{cell:>16}" for cell in cells) for name, cells in rows]


def memory_lines(config: JobConfig, ranks: int, gpu: Gpu) -> list[str]:
    """Return the memory of a step of each stage and of recovery, or why it is not estimated.

    Args:
        config: the job's config.
        ranks: number of GPUs.
        gpu: kind of GPU.

    Raises:
        ConfigError: if the job cannot run.
    """
    try:
        run = dry_run(config, ranks)
    except ConfigError:
        raise
    except Exception as error:  # a bug; the rest of the plan is still valid
        return [f"could not be estimated: {in_one_line(error)}"]
    if run.untraced:
        return [run.untraced.removeprefix("memory is ")]
    left_out = [f"{key} is not taken into account" for key in run.left_out]
    lines = []
    for stage, of_stage in run.memory.items():
        rank = f" of rank {of_stage.pipeline_rank} of the pipeline" if "pp" in run.mesh else ""
        lines.append(
            f"{of_stage.peak / 1e9:.1f} GB of {gpu.memory / 1e9:.0f} GB on each GPU{rank} at the "
            f"peak of a step of {stage}: {of_stage.parameters / 1e9:.1f} parameters, "
            f"{of_stage.gradients / 1e9:.1f} gradients, {of_stage.optimizer / 1e9:.1f} optimizer, "
            f"{of_stage.rest / 1e9:.1f} activations and other"
        )
    if run.worst_case:
        worst = max(of_stage.peak for of_stage in run.worst_case.values())
        lines.append(
            f"{worst / 1e9:.1f} GB at worst, when routers send all tokens to one GPU's experts"
        )
    return lines + left_out


def _advice(job_config: JobConfig, plan: Plan, surface: paper.Surface) -> list[str]:
    """Return the paper's good ranges at this size, and its losses near the config's values."""
    model = paper.nearest_model(plan.parameters)
    (low, high), (least, most) = paper.GOOD_BAG_SIZES[model], paper.GOOD_STEP_RATIOS
    bag_sizes = f"s = {low}" if low == high else f"s from {low} to {high}"
    best = surface.best
    lines = [
        f"at {model}, the nearest size: {bag_sizes}, r from {least} to {most}",
        f"final loss at {surface.title} weighting: "
        f"baseline {surface.baseline}, best {surface.values[best]} at r = {best[0]}, s = {best[1]}",
    ]
    if not plan.superposition:
        return lines
    s, ratio = plan.mean_bag_size, 1 - plan.recovery.steps / plan.steps
    columns = [size for size in surface.bag_sizes if abs(size - max(s, 2)) <= 2]
    if columns and len(plan.superposition) > 1:
        mean = f"the losses near the mean of these stages, s = {s:.1f}"
        lines.append(f"the paper's runs have one bag size; {mean}:")
    if columns:
        lines.append("    r \\ s" + "".join(f"{size:>8}" for size in columns))
        nearest = min(surface.ratios, key=lambda r: abs(r - ratio))
        lines += [
            f"    {r:<5}"
            + "".join(f"{surface.values.get((r, size), math.nan):8.4f}" for size in columns)
            for r in surface.ratios
            if abs(r - nearest) < 0.15
        ]
    return lines


def nearest_surface(job_config: JobConfig, plan: Plan) -> paper.Surface:
    """Return the paper's losses over s and r at the model and the steps nearest to the job's."""
    weighting = superposition_section(job_config).weighting
    return paper.nearest_surface(plan.parameters, plan.steps, weighting)


def summary(
    job_config: JobConfig, plan: Plan, gpu: Gpu, mfu: float | None, memory: list[str]
) -> list[str]:
    """Return the plan as lines of text.

    Args:
        job_config: the job's config.
        plan: plan of the job.
        gpu: kind of GPU to run on.
        mfu: MFU in (0, 1]; None for the MFU of the paper's hours for its models, and for an assumed
            MFU otherwise.
        memory: result of :func:`memory_lines`; empty to leave the memory away.
    """
    of_paper = mfu_of_paper(job_config, plan)
    source = "given" if mfu else "the paper's, on B200" if of_paper else "assumed"
    mfu = mfu or of_paper or ASSUMED_MFU
    model = job_config.model
    lines = [
        f"{model.name} {model.flavor}, {plan.parameters:,} parameters, on {plan.ranks} {gpu.name} "
        f"at {100 * mfu:.0f} % MFU ({source})",
        *_table(plan, gpu, mfu),
        f"Batch: {plan.batch}",
    ]
    surface = nearest_surface(job_config, plan)
    for title, block in (
        ("Memory", memory),
        ("Data", describe_data(job_config, plan)),
        ("Paper", _advice(job_config, plan, surface)),
    ):
        for number, line in enumerate(block):
            lines.append(f"{'' if number else title + ':':{len(title) + 1}} {line}")
    return lines
