"""The layouts of a job as a table of text."""

from collections.abc import Callable

from torchtitan.config import JobConfig

from .layout_traffic import KINDS
from .layouts import KEYS, Candidate, Layouts, Machine
from .model_shape import Layout

# names of the degrees by TorchTitan's names of its meshes
_MESHES = {
    "dp_replicate": "replicate",
    "dp_shard": "shard",
    "cp": "context",
    "tp": "tensor",
    "pp": "pipeline",
    "ep": "expert",
    "etp": "expert_tensor",
}
_GB = 1e9
_Cells = Callable[[Candidate], str]


def table(job_config: JobConfig, layouts: Layouts, machine: Machine, rows: int) -> list[str]:
    """Return lines of text: how many layouts fit, the best ones as a table, and the one to take.

    Args:
        job_config: the job's config.
        layouts: layouts of the job.
        machine: the GPUs that the layouts are for.
        rows: maximum number of layouts in the table.
    """
    shown = layouts.fitting[:rows]
    lines = [*_head(job_config, layouts, machine), *_counts(layouts, machine)]
    if not shown:
        return lines
    columns = _columns(job_config, layouts, shown, machine)
    cells = [[title for title, _ in columns]]
    cells += [[cell(candidate) for _, cell in columns] for candidate in shown]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        text = "".join(f"{cell:>{width + 2}}" for cell, width in others)
        lines.append(f"  {first[0]:{first[1]}}{text}")
    return [*lines, *_notes(job_config, shown), *_choice(layouts, machine)]


def _head(job_config: JobConfig, layouts: Layouts, machine: Machine) -> list[str]:
    training, gpu = job_config.training, machine.gpu
    checkpointing = job_config.activation_checkpoint
    mode = checkpointing.mode
    if mode == "selective":
        mode += f" ({checkpointing.selective_ac_option})"
    return [
        f"{job_config.model.name} {job_config.model.flavor} on {machine.ranks} {gpu.name}, "
        f"{machine.node} a node; a step is {layouts.sequences:,} sequences of {training.seq_len:,} "
        f"latents; activation checkpointing: {mode}",
        f"Time: computation at {100 * machine.mfu:.0f} % MFU; each GPU receives "
        f"{gpu.nvlink / _GB:.0f} GB/s over NVLink and {gpu.network / _GB:.0f} GB/s over the "
        "network",
        "Columns: param to worst, GB at the peak of a step of recovery; FSDP to network, "
        "GB that a GPU receives in a step; comm and step, seconds",
    ]


def _counts(layouts: Layouts, machine: Machine) -> list[str]:
    fitting, large = len(layouts.fitting), layouts.too_large
    text = (
        f"Layouts: {fitting + large} accepted by TorchTitan; {fitting} fit "
        f"{machine.usable / _GB:.0f} GB ({machine.gpu.memory / _GB:.0f} GB less 10 %)"
    )
    if (nearest := layouts.nearest) is not None:
        text += (
            f"; {large} too large, the nearest {name_of(nearest.layout)}: "
            f"{_short(nearest.memory.peak / _GB)} GB with a micro-batch of {nearest.batch.local}"
        )
    return [text]


def _columns(
    job_config: JobConfig, layouts: Layouts, shown: list[Candidate], machine: Machine
) -> list[tuple[str, _Cells]]:
    local = job_config.training.local_batch_size

    def batch(one: Candidate) -> str:
        mark = "" if one.batch.local == local else "*"
        return f"{one.batch.local}{mark} x {one.batch.accumulation}"

    def gigabytes(size: Callable[[Candidate], float]) -> _Cells:
        return lambda one: _short(size(one) / _GB)

    def bytes_of(kind: str) -> _Cells:
        return gigabytes(lambda one: one.traffic[kind].total)

    columns: list[tuple[str, _Cells]] = [
        ("layout", lambda one: name_of(one.layout)),
        ("batch", batch),
        ("param", gigabytes(lambda one: one.memory.parameters)),
        ("grad", gigabytes(lambda one: one.memory.gradients)),
        ("optim", gigabytes(lambda one: one.memory.optimizer)),
        ("activ", gigabytes(lambda one: one.memory.rest)),
        ("total", gigabytes(lambda one: one.memory.peak)),
        ("share", lambda one: f"{100 * one.memory.peak / machine.gpu.memory:.0f} %"),
    ]
    if layouts.shape.experts:
        columns.append(("worst", gigabytes(lambda one: one.worst.peak)))
    kinds = [kind for kind in KINDS if any(one.traffic[kind].total for one in shown)]
    columns += [
        *((kind, bytes_of(kind)) for kind in kinds),
        ("NVLink", gigabytes(lambda one: sum(kind.local for kind in one.traffic.values()))),
        ("network", gigabytes(lambda one: sum(kind.across for kind in one.traffic.values()))),
        ("comm", lambda one: _short(one.communication)),
        ("step", lambda one: _short(one.step)),
    ]
    return columns


def _notes(job_config: JobConfig, shown: list[Candidate]) -> list[str]:
    local = job_config.training.local_batch_size
    if all(one.batch.local == local for one in shown):
        return []
    return [f"  * training.local_batch_size lowered from {local}"]


def _choice(layouts: Layouts, machine: Machine) -> list[str]:
    if (best := layouts.choice) is None:
        return []
    share = 100 * best.memory.peak / machine.gpu.memory
    reason = "all communication overlaps with computation"
    if (waiting := best.step - best.compute) > 0:
        reason = f"computation waits {_short(waiting)} s for communication, the least of all"
    changes = [
        f"--parallelism.{key}={getattr(best.layout, name)}"
        for name, key in KEYS.items()
        if name == "shard" or getattr(best.layout, name) > 1
    ]
    changes += [
        f"--training.local_batch_size={best.batch.local}",
        f"--training.global_batch_size={layouts.sequences}",
    ]
    return [
        f"Take {name_of(best.layout)}: {_short(best.step)} s a step, {reason}; {share:.0f} % of "
        "the memory",
        f"  {' '.join(changes)}",
    ]


def _short(number: float) -> str:
    """Return a number with three digits, or without decimal places from 100 on."""
    return f"{number:.0f}" if number >= 100 or not number else f"{number:.3g}"


def name_of(layout: Layout) -> str:
    """Return the name of a layout: the sizes of its meshes that are not 1."""
    sizes = {mesh: getattr(layout, name) for mesh, name in _MESHES.items()}
    named = [f"{mesh} {size}" for mesh, size in sizes.items() if size > 1]
    return ", ".join(named) or "1 GPU"
