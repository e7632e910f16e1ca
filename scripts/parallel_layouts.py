"""The layouts that check_parallelism.py compares with one process."""

import math
from dataclasses import dataclass

GLOBAL_BATCH = 8  # sequences of a step
TOLERANCE = 1e-5  # relative, in float32
HALF, TOLERANCE_OF_HALF = "--training.mixed_precision_param=bfloat16", 5e-2

# name: of [parallelism], without "_degree"
_KEYS = {
    "replicate": "data_parallel_replicate",
    "shard": "data_parallel_shard",
    "TP": "tensor_parallel",
    "CP": "context_parallel",
    "PP": "pipeline_parallel",
    "EP": "expert_parallel",
    "ETP": "expert_tensor_parallel",
}
_OF_RANKS = ("replicate", "shard", "TP", "CP", "PP")  # experts are spread over the same ranks

MODELS = {
    "llama3": ("--model.name=llama3", "--model.flavor=demo"),
    "qwen3": ("--model.name=qwen3", "--model.flavor=tiny"),
    "qwen3 MoE": ("--model.name=qwen3", "--model.flavor=moe_tiny"),
}
LLAMA, MOE = ("llama3",), ("qwen3 MoE",)


@dataclass(frozen=True)
class Layout:
    """How a job is spread over processes, and what one process runs to compare with.

    Attributes:
        degrees: by their names in ``_KEYS``; 1 where none is given.
        options: further arguments, which the one process does not have.
        job: further arguments, which it has too.
        models: names in ``MODELS``.
        note: what ``options`` and ``job`` come to.
        gpu: why it cannot run on CPU.
    """

    degrees: dict[str, int]
    options: tuple[str, ...] = ()
    job: tuple[str, ...] = ()
    models: tuple[str, ...] = tuple(MODELS)
    note: str = ""
    gpu: str = ""

    @property
    def tolerance(self) -> float:
        """Of the deviations from one process."""
        return TOLERANCE_OF_HALF if HALF in self.job else TOLERANCE

    @property
    def processes(self) -> int:
        """Of all degrees together."""
        return math.prod(self.degrees.get(name, 1) for name in _OF_RANKS)

    @property
    def name(self) -> str:
        """Of the parallelisms with their degrees, and the note."""
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
        """Of the job on many processes."""
        degrees = {"shard": 1} | self.degrees
        batch = GLOBAL_BATCH // (degrees.get("replicate", 1) * degrees["shard"])
        return (
            f"--training.local_batch_size={batch}",
            *(f"--parallelism.{_KEYS[name]}_degree={n}" for name, n in degrees.items()),
            *self.job,
            *self.options,
        )


def _layouts() -> list[Layout]:
    def add(
        *options: str,
        job: tuple[str, ...] = (),
        models: tuple[str, ...] = tuple(MODELS),
        note: str = "",
        gpu: str = "",
        **degrees: int,
    ) -> None:
        layouts.append(Layout(degrees, options, job, models, note, gpu))

    layouts: list[Layout] = []
    dense = ("llama3", "qwen3")

    # one dimension
    add(replicate=2)
    add(shard=2)
    add(shard=4)
    add(replicate=2, shard=2)
    add(TP=2)
    add("--parallelism.disable_loss_parallel", TP=2, note="without loss parallel")
    add(TP=4, models=LLAMA)
    add(CP=2, note="headtail")
    add("--parallelism.context_parallel_load_balancer=None", CP=2, note="no load balancer")
    add(CP=4, note="headtail")
    for schedule in ("1F1B", "Interleaved1F1B", "GPipe", "InterleavedZeroBubble"):
        option = f"--parallelism.pipeline_parallel_schedule={schedule}"
        add(option, PP=2, models=LLAMA, note=schedule)
    for degrees in ({"replicate": 2}, {"shard": 2}, {"TP": 2}, {"PP": 2}):
        size = 4 if "TP" in degrees or "PP" in degrees else 2
        models = LLAMA if "PP" in degrees else tuple(MODELS)
        batch = f"--training.local_batch_size={size}"
        add(batch, note="2 micro-batches", models=models, **degrees)
    add(shard=2, EP=2, models=MOE)
    add(shard=4, EP=2, models=MOE)
    add(shard=4, EP=4, models=MOE)
    add(TP=2, EP=2, models=MOE)
    add(TP=2, EP=2, ETP=2, shard=2, models=MOE)

    # two, three and four
    add(shard=2, TP=2)
    add(shard=2, CP=2)
    add(replicate=2, CP=2)
    add(TP=2, CP=2)
    add(shard=2, TP=2, EP=2, models=MOE)
    add(shard=2, TP=2, EP=4, models=MOE)
    add(shard=2, CP=2, EP=2, models=MOE)
    add(shard=2, CP=2, EP=4, models=MOE)
    interleaved = "--parallelism.pipeline_parallel_schedule=Interleaved1F1B"
    add(shard=2, PP=2, models=LLAMA, note="1F1B")
    add(interleaved, shard=2, PP=2, models=LLAMA, note="Interleaved1F1B")
    add(TP=2, PP=2, models=LLAMA)
    add(CP=2, PP=2, models=LLAMA)
    add(replicate=2, shard=2, TP=2)
    add(replicate=2, shard=2, CP=2)
    add(shard=2, TP=2, CP=2)
    add(shard=2, TP=2, CP=2, EP=4, models=MOE)
    add(shard=2, TP=2, PP=2, models=LLAMA)
    add(interleaved, shard=2, TP=2, PP=2, models=LLAMA, note="Interleaved1F1B")
    add(TP=2, CP=2, PP=2, models=LLAMA)
    add(shard=2, TP=2, CP=2, PP=2, models=LLAMA)

    # attention over documents
    flex = ("--model.flavor=demo_flex",)
    long = (*flex, "--training.seq_len=512")  # two blocks of a mask for each rank
    add(job=flex, shard=2, models=LLAMA, note="flex, documents")
    add(job=flex, TP=2, models=LLAMA, note="flex, documents")
    add(job=flex, PP=2, models=LLAMA, note="flex, documents")
    for balancer in ("headtail", "ptrr", "None"):
        option = f"--parallelism.context_parallel_load_balancer={balancer}"
        note = f"flex, documents, {'no load balancer' if balancer == 'None' else balancer}"
        add(option, job=long, CP=2, models=LLAMA, note=note)
    add(
        job=("--model.flavor=demo_varlen", HALF),
        shard=2,
        models=LLAMA,
        note="varlen, documents",
        gpu="torch has variable-length attention on CUDA only",
    )

    # activation checkpointing and torch.compile
    for mode in ("selective", "full", "memory_budget"):
        checkpointing = f"--activation_checkpoint.mode={mode}"
        compiled = ("--compile.enable",) if mode == "memory_budget" else ()
        add(checkpointing, *compiled, shard=2, note=f"checkpointing {mode}")
    per_layer = ("--activation_checkpoint.mode=selective",)
    per_layer += ("--activation_checkpoint.selective_ac_option=2",)
    add(*per_layer, shard=2, note="checkpointing of every 2nd layer")
    both = ("--activation_checkpoint.mode=selective", "--compile.enable")
    add(*both, shard=2, models=LLAMA, note="checkpointing selective, compiled")
    for degrees in ({"TP": 2}, {"CP": 2}, {"PP": 2}):
        models = LLAMA if "PP" in degrees else tuple(MODELS)
        add(
            "--activation_checkpoint.mode=full", note="checkpointing full", models=models, **degrees
        )
    add("--compile.enable", note="compiled", models=MOE, TP=2, EP=2)
    for degrees in ({"shard": 2}, {"TP": 2}, {"shard": 2, "TP": 2}, {"CP": 2}, {"PP": 2}):
        models = LLAMA if "PP" in degrees else tuple(MODELS)
        add("--compile.enable", note="compiled", models=models, **degrees)
    add(
        "--compile.enable",
        "--parallelism.enable_async_tensor_parallel",
        job=(HALF,),
        TP=2,
        models=dense,
        note="async",
        gpu="asynchronous tensor parallelism is made of CUDA kernels",
    )

    # the options of superposition
    for loss in ("mce_alt", "bce", "hinge"):
        add(job=(f"--superposition.loss={loss}",), TP=2, models=LLAMA, note=loss)
    weighted = ("--superposition.weighting=power_law", "--superposition.scale=batch")
    variants = {
        "weighted": weighted[:1],
        "bags in": ("--superposition.mode=input",),
        "bags out": ("--superposition.mode=output",),
        "s times the sequences": weighted,
    }
    for note, job in variants.items():
        length = ("--training.seq_len=64",) if "--superposition.scale=batch" in job else ()
        for degrees in ({"shard": 2}, {"TP": 2}, {"CP": 2}, {"PP": 2}):
            add(job=(*job, *length), models=LLAMA, note=note, **degrees)
    chunks = "--lm_head.chunks=3"
    for degrees in ({"shard": 2}, {"TP": 2}, {"CP": 2}, {"shard": 2, "TP": 2}):
        add(chunks, note="LM head in chunks", **degrees)
    gathered = "--parallelism.disable_loss_parallel"
    add(chunks, gathered, TP=2, note="LM head in chunks, without loss parallel")
    return layouts


LAYOUTS = _layouts()
