"""Run a job's steps without its hardware: the real trainer on fake tensors.

One process simulates rank 0 of any number of ranks, or rank 0 of each stage of a pipeline in turn.
Meshes, sharding, optimizer and steps are the trainer's own. Only the values are missing (torch's
``FakeTensorMode``). So a model of any size is built in seconds, and every allocation of a step can
be added up.
"""

import dataclasses
import tempfile
from collections.abc import Sequence

from torchtitan.config import JobConfig

from ..checks.job import check_config
from ..checks.model import model_args_of
from ..core import Stage
from ..errors import in_one_line
from ..upstream.fake_parallel import Routing, parallel_stand_ins
from ..upstream.fake_pipeline import NotRepeatableError
from ..upstream.isolation import own_state
from ..upstream.stand_ins import stand_ins
from .simulated_trainer import Memory, SimulatedTrainer, reduced, simulated_train_spec


@dataclasses.dataclass(frozen=True)
class DryRun:
    """The result of a dry run.

    Attributes:
        mesh: size of each dimension of the layout that is not 1.
        accumulation: micro-batches in a step.
        memory: memory of a step of each stage and of recovery, when routers give each expert the
            same number of tokens. Empty where steps are not simulated.
        worst_case: the same memory when routers send as many tokens as they can to one rank's
            experts. Empty where that changes nothing: ranks do not share experts, or
            debug.moe_force_load_balance chooses them.
        untraced: why steps are not simulated; "" if they are.
        left_out: keys of the job that the memory does not take into account.
    """

    mesh: dict[str, int]
    accumulation: int
    memory: dict[Stage, Memory]
    worst_case: dict[Stage, Memory]
    untraced: str
    left_out: tuple[str, ...]


def dry_run(job_config: JobConfig, ranks: int, simulate: bool = True) -> DryRun:
    """Build a job without its GPUs, and simulate a step of each of its stages and of recovery.

    Call it in a process without a process group, after ``enable_cpu_if_alone``, on a machine whose
    accelerators are absent or hidden. What it assumes:

    - Steps are eager and in high precision. Neither torch.compile, which usually needs fewer
      temporary tensors, nor model converters are applied.
    - With gradient accumulation, one micro-batch on top of earlier gradients stands for all.
    - Without expert parallelism, memory does not depend on the experts that routers choose: a rank
      has all of them, and each token goes to ``top_k``.
    - Under DDP, the buckets of gradients are a buffer as large as the gradients.
    - DeepEP needs what the standard backend needs.

    Args:
        job_config: the job's config.
        ranks: number of ranks.
        simulate: whether to simulate steps; otherwise the job is only built.

    Raises:
        ConfigError: for a config that cannot run.
    """
    check_config(job_config, ranks)
    run = simulate_rank(job_config, ranks, 0, simulate)
    stages = job_config.parallelism.pipeline_parallel_degree
    if not run.memory or stages == 1:
        return run
    others = [simulate_rank(job_config, ranks, rank) for rank in range(1, stages)]
    if failed := next((other for other in others if other.untraced), None):
        return dataclasses.replace(run, memory={}, worst_case={}, untraced=failed.untraced)
    return dataclasses.replace(
        run,
        memory=_fullest([run.memory, *(other.memory for other in others)]),
        worst_case=_fullest([run.worst_case, *(other.worst_case for other in others)]),
    )


def simulate_rank(
    job_config: JobConfig,
    ranks: int,
    pipeline_rank: int,
    simulate: bool = True,
    repeats: bool = True,
) -> DryRun:
    """Build and simulate rank 0 of one stage of a pipeline, or rank 0 of a job without a pipeline.

    Args:
        job_config: the job's config.
        ranks: number of ranks.
        pipeline_rank: the rank in the pipeline; 0 without a pipeline.
        simulate: whether to simulate steps; otherwise the job is only built.
        repeats: whether to simulate only some micro-batches of a pipeline, if its schedule allows.
    """
    stages = job_config.parallelism.pipeline_parallel_degree
    model_args = model_args_of(job_config)
    routing = Routing(getattr(getattr(model_args, "moe_args", None), "top_k", 1))
    with (
        own_state(job_config, ranks, pipeline_rank * ranks // stages),
        stand_ins(model_args),
        parallel_stand_ins(routing),
        simulated_train_spec(job_config),
        tempfile.TemporaryDirectory() as folder,
    ):
        trainer = SimulatedTrainer(reduced(job_config, folder))
        trainer.repeats = repeats
        layout = trainer.parallel_dims
        names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")
        accumulation = trainer.gradient_accumulation_steps
        untraced, memory, worst_case = _untraced(job_config), {}, {}
        if simulate and not untraced:
            try:
                trainer.prepare()
                memory = trainer.simulate()
                if layout.ep_enabled and not job_config.debug.moe_force_load_balance:
                    routing.worst = True
                    worst_case = trainer.simulate()
            except NotRepeatableError:
                repeats = False
            except Exception as error:  # the job could be built, so it may still train
                memory, worst_case = {}, {}
                untraced = f"memory could not be estimated: {in_one_line(error)}"
        trainer.close()
    if trainer.repeats and not repeats:
        return simulate_rank(job_config, ranks, pipeline_rank, simulate, repeats)
    return DryRun(
        mesh={name: size for name in names if (size := getattr(layout, name)) > 1},
        accumulation=accumulation,
        memory=memory,
        worst_case=worst_case,
        untraced=untraced,
        left_out=_left_out(job_config),
    )


def _fullest(of_ranks: Sequence[dict[Stage, Memory]]) -> dict[Stage, Memory]:
    """Return for each stage the memory of the rank that needs most."""
    return {
        stage: max((memory[stage] for memory in of_ranks), key=lambda memory: memory.peak)
        for stage in of_ranks[0]
    }


def _left_out(job_config: JobConfig) -> tuple[str, ...]:
    """Return the keys that the memory does not take into account."""
    layout = job_config.parallelism
    other_backend = layout.expert_parallel_comm_backend != "standard"
    return tuple(
        key
        for key, applies in (
            ("model.converters", bool(job_config.model.converters)),
            (
                "parallelism.expert_parallel_comm_backend",
                layout.expert_parallel_degree > 1 and other_backend,
            ),
        )
        if applies
    )


def _untraced(job_config: JobConfig) -> str:
    """Return why memory cannot be estimated; "" if it can."""
    for key, applies in (
        ("training.enable_cpu_offload", job_config.training.enable_cpu_offload),
        (
            'activation_checkpoint.mode = "memory_budget": only torch.compile applies it',
            job_config.activation_checkpoint.mode == "memory_budget",
        ),
        (
            "checkpoint.create_seed_checkpoint: such a job takes no steps",
            job_config.checkpoint.create_seed_checkpoint,
        ),
    ):
        if applies:
            return f"memory is not estimated with {key}"
    return ""
