"""What the values of a key may be, where its type does not say it all."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchtitan.components import checkpoint


@dataclass(frozen=True)
class Allowed:
    """Values that a key may have.

    Attributes:
        has: whether a value, of the key's type, is one of them.
        text: what they are, for an error.
    """

    has: Callable[[Any], bool]
    text: str


def _at_least(least: int, more: str = "") -> Allowed:
    text = f"an integer of at least {least}"
    return Allowed(lambda value: value >= least, f"{text} ({more})" if more else text)


def _or_minus_1(meaning: str) -> Allowed:
    return Allowed(
        lambda value: value >= 1 or value == -1, f"an integer of at least 1, or -1 {meaning}"
    )


def _share(text: str, one: bool = True) -> Allowed:
    return Allowed(lambda value: 0 <= value < 1 or (one and value == 1), text)


def _one_of(*choices: str) -> Allowed:
    return Allowed(lambda value: value in choices, f"one of {', '.join(choices)}")


def _each_of(*choices: str) -> Allowed:
    return Allowed(
        lambda values: all(value in choices for value in values), f"a list of {', '.join(choices)}"
    )


_NOT_NEGATIVE = Allowed(lambda value: 0 <= value < math.inf, "a finite number of at least 0")
_WEIGHTS = Allowed(
    lambda weights: all(0 < weight < math.inf for weight in weights),
    "a list of finite numbers above 0",
)
_SEEDS = Allowed(lambda seed: -(2**63) <= seed < 2**64, "an integer of at most 64 bits")

REINIT_MODULES = ("tok_embeddings", "output")
_STATES = (
    checkpoint.MODEL,
    checkpoint.OPTIMIZER,
    checkpoint.LR_SCHEDULER,
    checkpoint.DATALOADER,
    checkpoint.TRAIN_STATE,
)

ALLOWED: dict[str, Allowed] = {
    "profiling.profile_freq": _at_least(1),
    "profiling.profiler_active": _at_least(1),
    "profiling.profiler_warmup": _at_least(0),
    "metrics.log_freq": _at_least(1),
    "optimizer.lr": _NOT_NEGATIVE,
    "optimizer.beta1": _share("in [0, 1)", one=False),
    "optimizer.beta2": _share("in [0, 1)", one=False),
    "optimizer.eps": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "lr_scheduler.warmup_steps": _at_least(0),
    "lr_scheduler.total_steps": _at_least(1),
    "lr_scheduler.decay_ratio": _share("in [0, 1]"),
    "lr_scheduler.min_lr_factor": _share("in [0, 1]"),
    "training.local_batch_size": _at_least(1),
    "training.global_batch_size": _or_minus_1("for one micro-batch on each data-parallel rank"),
    "training.seq_len": _at_least(1, "tokens"),
    "training.max_norm": Allowed(
        lambda norm: norm > 0, "a number above 0 (inf leaves gradients as they are)"
    ),
    "training.steps": _at_least(1),
    "training.gc_freq": _at_least(1),
    "parallelism.data_parallel_replicate_degree": _at_least(1),
    "parallelism.data_parallel_shard_degree": _or_minus_1("for as many as there are ranks"),
    "parallelism.tensor_parallel_degree": _at_least(1),
    "parallelism.pipeline_parallel_degree": _at_least(1),
    "parallelism.pipeline_parallel_first_stage_less_layers": _at_least(0),
    "parallelism.pipeline_parallel_last_stage_less_layers": _at_least(0),
    "parallelism.pipeline_parallel_layers_per_stage": _at_least(1),
    "parallelism.pipeline_parallel_microbatch_size": _at_least(1),
    "parallelism.context_parallel_degree": _at_least(1),
    "parallelism.context_parallel_load_balancer": Allowed(
        lambda name: name in ("headtail", "ptrr"),
        "headtail or ptrr (on the command line, --parallelism.context_parallel_load_balancer None "
        "is without)",
    ),
    "parallelism.expert_parallel_degree": _at_least(1),
    "parallelism.expert_tensor_parallel_degree": _at_least(1),
    "checkpoint.interval": _at_least(1, "steps"),
    "checkpoint.keep_latest_k": Allowed(
        lambda count: count == 0 or count >= 2,
        "0, which keeps all checkpoints, or at least 2: the newest may still be being written",
    ),
    "checkpoint.load_step": Allowed(lambda step: step >= -1, "a step, or -1 for the newest one"),
    "checkpoint.exclude_from_loading": _each_of(*_STATES),
    "activation_checkpoint.selective_ac_option": Allowed(
        lambda option: option == "op" or option.isdecimal(),
        'the string "op", or how many layers apart those with checkpointing are, such as "2"',
    ),
    "activation_checkpoint.memory_budget": _share("in [0, 1]"),
    "activation_checkpoint.determinism_check": _one_of("default", "none"),
    "compile.components": _each_of("model", "loss"),
    "comm.init_timeout_seconds": _at_least(1),
    "comm.train_timeout_seconds": _at_least(1),
    "comm.trace_buf_size": _at_least(0),
    "fault_tolerance.process_group": _one_of("gloo", "nccl"),
    "fault_tolerance.process_group_timeout_ms": _at_least(1),
    "fault_tolerance.replica_id": _at_least(0),
    "fault_tolerance.group_size": _at_least(0),
    "fault_tolerance.min_replica_size": _at_least(1),
    "fault_tolerance.semi_sync_method": _one_of("local_sgd", "diloco"),
    "validation.local_batch_size": _at_least(1),
    "validation.seq_len": _at_least(1, "tokens"),
    "validation.freq": _at_least(1, "steps"),
    "validation.steps": _or_minus_1("for all of the data"),
    "debug.seed": _SEEDS,
    "superposition.bag_size": _at_least(1, "1 switches superposition off"),
    "superposition.step_ratio": _share("in [0, 1)", one=False),
    "superposition.steps": _at_least(0),
    "superposition.reinit_at_recovery": _each_of(*REINIT_MODULES),
    "token_shards.weights": _WEIGHTS,
    "lm_head.chunks": _at_least(1),
    "resilience.max_skipped_steps": _at_least(0),
} | {
    f"{section}.dataloader.{key}": allowed
    for section in ("training", "validation")
    for key, allowed in {"num_workers": _at_least(0), "prefetch_factor": _at_least(1)}.items()
}
