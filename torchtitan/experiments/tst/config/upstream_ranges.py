"""Ranges of the keys of TorchTitan's own sections, where their types allow too much."""

import math

from .allowed import Allowed, at_least, each_of, one_of, or_minus_1, share

_NOT_NEGATIVE = Allowed(lambda value: 0 <= value < math.inf, "a finite number of at least 0")
_SEEDS = Allowed(lambda seed: -(2**63) <= seed < 2**64, "an integer of at most 64 bits")
_STATES = ("model", "optimizer", "lr_scheduler", "dataloader", "train_state")  # of a checkpoint

UPSTREAM_RANGES: dict[str, Allowed] = {
    "profiling.profile_freq": at_least(1),
    "profiling.profiler_active": at_least(1),
    "profiling.profiler_warmup": at_least(0),
    "metrics.log_freq": at_least(1),
    "optimizer.lr": _NOT_NEGATIVE,
    "optimizer.beta1": share("in [0, 1)", one=False),
    "optimizer.beta2": share("in [0, 1)", one=False),
    "optimizer.eps": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "lr_scheduler.warmup_steps": at_least(0),
    "lr_scheduler.total_steps": at_least(1),
    "lr_scheduler.decay_ratio": share("in [0, 1]"),
    "lr_scheduler.min_lr_factor": share("in [0, 1]"),
    "training.local_batch_size": at_least(1),
    "training.global_batch_size": or_minus_1("for one micro-batch on each data-parallel rank"),
    "training.seq_len": at_least(1, "tokens"),
    "training.max_norm": Allowed(
        lambda norm: norm > 0, "a number above 0 (inf switches clipping off)"
    ),
    "training.steps": at_least(1),
    "training.gc_freq": at_least(1),
    "parallelism.data_parallel_replicate_degree": at_least(1),
    "parallelism.data_parallel_shard_degree": or_minus_1("for all remaining ranks"),
    "parallelism.tensor_parallel_degree": at_least(1),
    "parallelism.pipeline_parallel_degree": at_least(1),
    "parallelism.pipeline_parallel_first_stage_less_layers": at_least(0),
    "parallelism.pipeline_parallel_last_stage_less_layers": at_least(0),
    "parallelism.pipeline_parallel_layers_per_stage": at_least(1),
    "parallelism.pipeline_parallel_microbatch_size": at_least(1),
    "parallelism.context_parallel_degree": at_least(1),
    "parallelism.context_parallel_load_balancer": Allowed(
        lambda name: name in ("headtail", "ptrr"),
        "headtail or ptrr (on the command line, --parallelism.context_parallel_load_balancer None "
        "switches it off)",
    ),
    "parallelism.expert_parallel_degree": at_least(1),
    "parallelism.expert_tensor_parallel_degree": at_least(1),
    "checkpoint.interval": at_least(1, "steps"),
    "checkpoint.keep_latest_k": Allowed(
        lambda count: count == 0 or count >= 2,
        "0, which keeps all checkpoints, or at least 2, because the newest may be incomplete",
    ),
    "checkpoint.load_step": Allowed(lambda step: step >= -1, "a step, or -1 for the newest one"),
    "checkpoint.exclude_from_loading": each_of(*_STATES),
    "activation_checkpoint.selective_ac_option": Allowed(
        lambda option: option == "op" or option.isdecimal(),
        'the string "op", or an integer in quotes, such as "2" to checkpoint every second layer',
    ),
    "activation_checkpoint.memory_budget": share("in [0, 1]"),
    "activation_checkpoint.determinism_check": one_of("default", "none"),
    "compile.components": each_of("model", "loss"),
    "comm.init_timeout_seconds": at_least(1),
    "comm.train_timeout_seconds": at_least(1),
    "comm.trace_buf_size": at_least(0),
    "fault_tolerance.process_group": one_of("gloo", "nccl"),
    "fault_tolerance.process_group_timeout_ms": at_least(1),
    "fault_tolerance.replica_id": at_least(0),
    "fault_tolerance.group_size": at_least(0),
    "fault_tolerance.min_replica_size": at_least(1),
    "fault_tolerance.semi_sync_method": one_of("local_sgd", "diloco"),
    "validation.local_batch_size": at_least(1),
    "validation.seq_len": at_least(1, "tokens"),
    "validation.freq": at_least(1, "steps"),
    "validation.steps": or_minus_1("for all of the data"),
    "debug.seed": _SEEDS,
} | {
    f"{section}.dataloader.{key}": allowed
    for section in ("training", "validation")
    for key, allowed in {"num_workers": at_least(0), "prefetch_factor": at_least(1)}.items()
}
