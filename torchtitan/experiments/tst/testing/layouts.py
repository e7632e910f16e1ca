"""The layouts that are compared with one process, to show that training is exact under them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

GLOBAL_BATCH = 8  # sequences of a step
TOLERANCE = 1e-5  # relative, in float32
HALF, TOLERANCE_OF_HALF = "--training.mixed_precision_param=bfloat16", 5e-2

# keys of [parallelism] without "_degree", by the names used here
_KEYS = {
    "replicate": "data_parallel_replicate",
    "shard": "data_parallel_shard",
    "TP": "tensor_parallel",
    "CP": "context_parallel",
    "PP": "pipeline_parallel",
    "EP": "expert_parallel",
    "ETP": "expert_tensor_parallel",
}
_OF_RANKS = ("replicate", "shard", "TP", "CP", "PP")  # EP and ETP use the same ranks

MODELS = {
    "llama3": ("--model.name=llama3", "--model.flavor=demo"),
    "qwen3": ("--model.name=qwen3", "--model.flavor=tiny"),
    "qwen3 MoE": ("--model.name=qwen3", "--model.flavor=moe_tiny"),
    "llama4": ("--model.name=llama4", "--model.flavor=tiny"),
}
LLAMA, DENSE, MOE = ("llama3",), ("llama3", "qwen3"), ("qwen3 MoE",)
PIPELINED_MOE = ("llama4",)  # only where experts are balanced


@dataclass(frozen=True)
class Layout:
    """The layout of a job on many processes, and the arguments of one process to compare with.

    Attributes:
        degrees: degrees by their names in ``_KEYS``; 1 where none is given.
        options: further arguments, which the one process does not have.
        job: further arguments, which the one process has too.
        models: names in ``MODELS``.
        note: short name of ``options`` and ``job``.
        gpu: why it cannot run on CPU; "" if it can.
    """

    degrees: dict[str, int]
    options: tuple[str, ...] = ()
    job: tuple[str, ...] = ()
    models: tuple[str, ...] = (*DENSE, *MOE)
    note: str = ""
    gpu: str = ""

    @property
    def tolerance(self) -> float:
        """The largest deviation from one process that counts as agreement."""
        return TOLERANCE_OF_HALF if HALF in self.job else TOLERANCE

    @property
    def processes(self) -> int:
        """Number of processes."""
        return math.prod(self.degrees.get(name, 1) for name in _OF_RANKS)

    @property
    def name(self) -> str:
        """The parallelisms with their degrees, and the note."""
        degrees = dict(self.degrees)
        replicate, shard = (degrees.pop(name, 1) for name in ("replicate", "shard"))
        parts = [f"{name} {degree}" for name, degree in degrees.items()]
        if replicate > 1 and shard > 1:
            parts.insert(0, f"HSDP {replicate}x{shard}")
        elif shard > 1:
            parts.insert(0, f"FSDP {shard}")
        elif replicate > 1:
            parts.insert(0, f"{'replicate' if parts else 'DDP'} {replicate}")
        return ", ".join(filter(None, [" + ".join(parts), self.note]))

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments of the job on many processes."""
        degrees = {"shard": 1} | self.degrees
        batch = GLOBAL_BATCH // (degrees.get("replicate", 1) * degrees["shard"])
        return (
            f"--training.local_batch_size={batch}",
            *(f"--parallelism.{_KEYS[name]}_degree={n}" for name, n in degrees.items()),
            *self.job,
            *self.options,
        )


def _layout(
    *options: str,
    job: tuple[str, ...] = (),
    models: tuple[str, ...] = (),
    note: str = "",
    gpu: str = "",
    **degrees: int,
) -> Layout:
    """Return a layout; by default, of all models that TorchTitan supports it for."""
    if not models:
        models = LLAMA if "PP" in degrees else MOE if "EP" in degrees else (*DENSE, *MOE)
    return Layout(degrees, options, job, models, note, gpu)


def _degrees(*parallelisms: str) -> list[dict[str, Any]]:
    """Return degrees of 2 for each of these groups of parallelisms, such as "shard TP"."""
    return [dict.fromkeys(names.split(), 2) for names in parallelisms]


def _one_dimension() -> Iterator[Layout]:
    yield _layout(replicate=2)
    yield _layout(shard=2)
    yield _layout(shard=4)
    yield _layout(replicate=2, shard=2)
    yield _layout(TP=2)
    yield _layout("--parallelism.disable_loss_parallel", TP=2, note="without loss parallel")
    yield _layout(TP=4, models=LLAMA)
    yield _layout(CP=2, note="headtail")
    yield _layout(
        "--parallelism.context_parallel_load_balancer=None", CP=2, note="no load balancer"
    )
    yield _layout(CP=4, note="headtail")
    for schedule in ("1F1B", "Interleaved1F1B", "GPipe", "InterleavedZeroBubble"):
        option = f"--parallelism.pipeline_parallel_schedule={schedule}"
        yield _layout(option, PP=2, note=schedule)
    for degrees in _degrees("replicate", "shard", "TP", "PP"):
        size = 4 if "TP" in degrees or "PP" in degrees else 2
        batch = f"--training.local_batch_size={size}"
        yield _layout(batch, note="2 micro-batches", **degrees)
    yield _layout(shard=2, EP=2)
    yield _layout(shard=4, EP=2)
    yield _layout(shard=4, EP=4)
    yield _layout(TP=2, EP=2)
    yield _layout(TP=2, EP=2, ETP=2, shard=2)


def _combinations() -> Iterator[Layout]:
    yield _layout(shard=2, TP=2)
    yield _layout(shard=2, CP=2)
    yield _layout(replicate=2, CP=2)
    yield _layout(TP=2, CP=2)
    yield _layout(shard=2, TP=2, EP=2)
    yield _layout(shard=2, TP=2, EP=4)
    yield _layout(shard=2, CP=2, EP=2)
    yield _layout(shard=2, CP=2, EP=4)
    interleaved = "--parallelism.pipeline_parallel_schedule=Interleaved1F1B"
    yield _layout(shard=2, PP=2, note="1F1B")
    yield _layout(interleaved, shard=2, PP=2, note="Interleaved1F1B")
    yield _layout(TP=2, PP=2)
    yield _layout(CP=2, PP=2)
    yield _layout(replicate=2, shard=2, TP=2)
    yield _layout(replicate=2, shard=2, CP=2)
    yield _layout(shard=2, TP=2, CP=2)
    yield _layout(shard=2, TP=2, CP=2, EP=4)
    yield _layout(shard=2, TP=2, PP=2)
    yield _layout(interleaved, shard=2, TP=2, PP=2, note="Interleaved1F1B")
    yield _layout(TP=2, CP=2, PP=2)
    yield _layout(shard=2, TP=2, CP=2, PP=2)


def _over_documents() -> Iterator[Layout]:
    flex = ("--model.flavor=demo_flex",)
    long = (*flex, "--training.seq_len=512")  # two blocks of a mask for each rank
    yield _layout(job=flex, shard=2, models=LLAMA, note="flex, documents")
    yield _layout(job=flex, TP=2, models=LLAMA, note="flex, documents")
    yield _layout(job=flex, PP=2, note="flex, documents")
    for balancer in ("headtail", "ptrr", "None"):
        option = f"--parallelism.context_parallel_load_balancer={balancer}"
        note = f"flex, documents, {'no load balancer' if balancer == 'None' else balancer}"
        yield _layout(option, job=long, CP=2, models=LLAMA, note=note)
    yield _layout(
        job=("--model.flavor=demo_varlen", HALF),
        shard=2,
        models=LLAMA,
        note="varlen, documents",
        gpu="torch has variable-length attention on CUDA only",
    )


def _checkpointed_and_compiled() -> Iterator[Layout]:
    for mode in ("selective", "full", "memory_budget"):
        checkpointing = f"--activation_checkpoint.mode={mode}"
        compiled = ("--compile.enable",) if mode == "memory_budget" else ()
        yield _layout(checkpointing, *compiled, shard=2, note=f"checkpointing {mode}")
    per_layer = (
        "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=2",
    )
    yield _layout(*per_layer, shard=2, note="checkpointing of every 2nd layer")
    both = ("--activation_checkpoint.mode=selective", "--compile.enable")
    yield _layout(*both, shard=2, models=LLAMA, note="checkpointing selective, compiled")
    for degrees in _degrees("TP", "CP", "PP"):
        yield _layout("--activation_checkpoint.mode=full", note="checkpointing full", **degrees)
    yield _layout("--compile.enable", note="compiled", TP=2, EP=2)
    for degrees in _degrees("shard", "TP", "shard TP", "CP", "PP"):
        yield _layout("--compile.enable", note="compiled", **degrees)
    yield _layout(
        "--compile.enable",
        "--parallelism.enable_async_tensor_parallel",
        job=(HALF,),
        TP=2,
        models=DENSE,
        note="async",
        gpu="asynchronous tensor parallelism is made of CUDA kernels",
    )


def _options_of_superposition() -> Iterator[Layout]:
    for loss in ("mce_alt", "bce", "hinge"):
        yield _layout(job=(f"--superposition.loss={loss}",), TP=2, models=LLAMA, note=loss)
    weighted = ("--superposition.weighting=power_law", "--superposition.scale=batch")
    variants = {
        "weighted": weighted[:1],
        "bags in": ("--superposition.mode=input",),
        "bags out": ("--superposition.mode=output",),
        "s times the sequences": weighted,
    }
    for note, job in variants.items():
        length = ("--training.seq_len=64",) if "--superposition.scale=batch" in job else ()
        for degrees in _degrees("shard", "TP", "CP", "PP"):
            yield _layout(job=(*job, *length), models=LLAMA, note=note, **degrees)
    chunks = "--lm_head.chunks=3"
    for degrees in _degrees("shard", "TP", "CP", "shard TP"):
        yield _layout(chunks, note="LM head in chunks", **degrees)
    gathered = "--parallelism.disable_loss_parallel"
    yield _layout(chunks, gathered, TP=2, note="LM head in chunks, without loss parallel")


def _stages() -> Iterator[Layout]:
    stages = ("--superposition.bag_size=8,4,2",)
    for degrees in _degrees("shard", "TP", "CP", "PP", "shard TP"):
        yield _layout(job=stages, note="stages", **degrees)
    yield _layout(job=stages, note="stages", shard=2, EP=2)
    for degrees in _degrees("shard", "TP", "CP", "PP"):
        yield _layout("--compile.enable", job=stages, note="stages, compiled", **degrees)
    batch = (*stages, "--superposition.scale=batch", "--training.seq_len=64")
    for degrees in _degrees("shard", "CP", "PP"):
        note = "stages, s times the sequences"
        yield _layout(job=batch, models=LLAMA, note=note, **degrees)


def _balanced_experts() -> Iterator[Layout]:
    # so large a weight that the loss contributes to every gradient
    auxiliary_loss = ("--load_balance.method=auxiliary_loss", "--load_balance.coefficient=0.1")
    bias = ("--load_balance.method=bias",)
    experts = (
        *_degrees("shard", "TP", "CP", "shard EP", "TP EP", "shard TP EP ETP", "shard CP"),
        {"replicate": 2},
        {"replicate": 2, "shard": 2},
        {"shard": 4, "EP": 4},
        {"shard": 2, "CP": 2, "EP": 4},
        {"shard": 2, "TP": 2, "EP": 4},
    )
    for degrees in experts:
        yield _layout(job=auxiliary_loss, models=MOE, note="auxiliary loss", **degrees)
    micro_batches = "--training.local_batch_size={}"  # the one process has micro-batches, too
    yield _layout(
        micro_batches.format(2),
        job=(*auxiliary_loss, micro_batches.format(4)),
        models=MOE,
        note="auxiliary loss, 2 micro-batches",
        shard=2,
        EP=2,
    )
    for degrees in _degrees("shard", "TP", "shard EP", "TP EP", "shard CP"):
        yield _layout(job=bias, models=MOE, note="bias", **degrees)
    # GPipe computes the forward of all micro-batches first, so the loss covers all of them
    for schedule, job, note in (
        ("GPipe", auxiliary_loss, "auxiliary loss"),
        ("GPipe", bias, "bias"),
        ("1F1B", bias, "bias"),
        ("InterleavedZeroBubble", bias, "bias"),
    ):
        option = f"--parallelism.pipeline_parallel_schedule={schedule}"
        yield _layout(option, job=job, models=PIPELINED_MOE, note=f"{schedule}, {note}", PP=2)
    yield _layout(job=auxiliary_loss, models=PIPELINED_MOE, note="auxiliary loss", shard=2, TP=2)
    for mode in ("full", "selective"):
        checkpointing = f"--activation_checkpoint.mode={mode}"
        for job, note in ((auxiliary_loss, "auxiliary loss"), (bias, "bias")):
            note = f"{note}, checkpointing {mode}"
            yield _layout(checkpointing, job=job, models=MOE, note=note, shard=2, EP=2)
    for degrees in _degrees("shard", "TP EP"):
        note = "auxiliary loss, compiled"
        yield _layout("--compile.enable", job=auxiliary_loss, models=MOE, note=note, **degrees)
    both = ("--activation_checkpoint.mode=selective", "--compile.enable")
    note = "auxiliary loss, checkpointing selective, compiled"
    yield _layout(*both, job=auxiliary_loss, models=MOE, note=note, shard=2)


LAYOUTS = [
    *_one_dimension(),
    *_combinations(),
    *_over_documents(),
    *_checkpointed_and_compiled(),
    *_options_of_superposition(),
    *_stages(),
    *_balanced_experts(),
]
