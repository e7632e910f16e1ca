"""Time a training step of each phase and TorchTitan's own step, on the same config and data.

TorchTitan's trainer, this package's trainer in recovery, and this package's trainer in
superposition with each bag size take their steps in turn, in one process, or under torchrun on the
same ranks. All read random tokens from token shards with the same loader, so the job's corpus and
tokenizer are not needed. A step is one micro-batch of training.local_batch_size. Arguments that are
not listed here are the job's. Writes table, JSON and plot. Under torchrun, all local batches must
fit into memory.

    python scripts/benchmark/step.py --job.config_file train_configs/demo/tst.toml
    torchrun --nproc_per_node=8 scripts/benchmark/step.py --job.config_file JOB.toml
"""

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import measuring
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torchtitan.distributed import utils as dist_utils
from torchtitan.protocols import train_spec as train_spec_module
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_module, device_type
from torchtitan.train import Trainer
from typing_extensions import override

from command_line import documented_parser
from torchtitan.experiments.tst.checks.job import check_config
from torchtitan.experiments.tst.checks.model import model_args_of
from torchtitan.experiments.tst.config.job_config import JobConfig
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.config.sections import TokenShards
from torchtitan.experiments.tst.data.build import build_dataloader
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer
from torchtitan.experiments.tst.upstream.names import train_spec_as
from torchtitan.experiments.tst.upstream.replaced import replaced

UPSTREAM, RECOVERY = "TorchTitan", "recovery"
STEPS = 10**6  # steps of a run, more than are taken


class BenchmarkTrainer(SuperpositionTrainer):
    """The trainer without the check of a job's files."""

    @override
    def check(self, job_config: JobConfig) -> None:
        check_config(job_config, int(os.environ["WORLD_SIZE"]))


def job(
    arguments: list[str],
    folder: Path,
    local_batch_size: int | None = None,
    bag_size: int | None = None,
) -> JobConfig:
    """Return the job's config with superposition in all steps, or without it for bag size 1.

    Args:
        arguments: arguments of the job, as on the command line.
        folder: folder of the random tokens and of the run.
        local_batch_size: local batch size; None for the job's.
        bag_size: bag size; None for the job's.
    """
    config = SuperpositionConfigManager().parse_args(arguments)
    config.job.dump_folder = str(folder / "run")
    config.checkpoint.enable = config.validation.enable = False
    config.metrics.enable_tensorboard = config.metrics.enable_wandb = False
    config.metrics.log_freq = 10**9
    training, section = config.training, config.superposition
    training.dataset, training.dataset_path = "token_shards", str(folder / "tokens")
    config.token_shards = TokenShards()
    training.steps, training.global_batch_size = STEPS, -1
    training.local_batch_size = local_batch_size or training.local_batch_size
    section.bag_size = bag_size or section.bag_size
    section.step_ratio, section.steps = None, STEPS - 1
    return config


def steps_of(trainer: Trainer, after: int = 2) -> measuring.Run:
    """Return a function that takes the next step of the trainer, from step ``after`` + 1 on.

    By default it begins after the first step, which is logged, and in recovery after the boundary.
    """
    batches = trainer.batch_generator(trainer.dataloader)
    trainer.step = after

    def run() -> None:
        trainer.step += 1
        trainer.train_step(batches)

    return run


@contextlib.contextmanager
def no_tokenizer(model: str) -> Iterator[None]:
    """Build trainers of the model without a tokenizer and with one shared process group."""
    init_distributed = dist_utils.init_distributed

    @functools.wraps(init_distributed)
    def init_once(*args: object, **kwargs: object) -> int:
        return dist.get_world_size() if dist.is_initialized() else init_distributed(*args, **kwargs)

    spec = dataclasses.replace(
        train_spec_module.get_train_spec(model),
        build_tokenizer_fn=None,
        build_dataloader_fn=build_dataloader,
    )
    with (
        replaced(dist_utils, "init_distributed", init_once),
        train_spec_as(model, spec),
    ):
        yield


def build_trainers(
    arguments: list[str], folder: Path, local_batch_size: int, bag_sizes: list[int]
) -> dict[str, Trainer]:
    """Return the trainers of all contestants by name."""
    plain = job(arguments, folder, local_batch_size, bag_size=1)
    recovery = job(arguments, folder, local_batch_size, bag_sizes[0])
    recovery.superposition.steps = 1
    with no_tokenizer(plain.model.name):
        made = {UPSTREAM: Trainer(plain), RECOVERY: BenchmarkTrainer(recovery)}
        for s in bag_sizes:
            config = job(arguments, folder, local_batch_size, s)
            made[f"superposition, s = {s}"] = BenchmarkTrainer(config)
    return made


def measure_batch(
    arguments: list[str], folder: Path, local_batch_size: int, bag_sizes: list[int], rounds: int
) -> "dict[str, Result]":
    """Return the results of all contestants by name, and close their trainers."""
    made = build_trainers(arguments, folder, local_batch_size, bag_sizes)
    try:
        runs = {name: steps_of(trainer) for name, trainer in made.items()}
        measured = measuring.measure(runs, rounds, warmup=4)
        return {name: Result.of(made[name], measured[name]) for name in made}
    finally:
        for trainer in made.values():
            trainer.close()


def free_memory() -> None:
    """Free the memory of trainers that are no longer in use, including compiled code."""
    torch.compiler.reset()
    gc.collect()
    if device_type != "cpu":
        device_module.empty_cache()


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a contestant: the time of its step, and the work of that step on a rank."""

    measurement: measuring.Measurement
    latents: int
    data_tokens: int
    flops: float
    mfu: float | None

    @classmethod
    def of(cls, trainer: Trainer, measurement: measuring.Measurement) -> "Result":
        """Return the result of a trainer after its last step."""
        training, processor = trainer.job_config.training, trainer.metrics_processor
        latents = data_tokens = training.local_batch_size * training.seq_len
        if isinstance(trainer, SuperpositionTrainer):
            shape = trainer.batch_shape(trainer.step)
            latents = shape.sequences * shape.latents
            data_tokens = shape.sequences * shape.data_tokens
        flops = (
            latents * processor.num_flops_per_token / trainer.parallel_dims.non_data_parallel_size
        )
        mfu = None
        if device_type != "cpu" and not measurement.out_of_memory:
            mfu = flops / measurement.median / processor.gpu_peak_flops
        return cls(measurement, latents, data_tokens, flops, mfu)

    def json(self) -> dict[str, object]:
        """Return the result for a JSON file."""
        return {**self.__dict__, "measurement": self.measurement.json()}


def row(name: str, results: dict[str, Result]) -> list[str]:
    result, median = results[name], results[name].measurement.median
    if result.measurement.out_of_memory:
        return [name, "out of memory", *[""] * (len(HEADER) - 1)]
    return [
        name,
        f"{1e3 * median:.2f}",
        f"{result.measurement.ratio(results[UPSTREAM].measurement):.3f}",
        f"{result.measurement.ratio(results[RECOVERY].measurement):.3f}",
        f"{result.latents / median:,.0f}",
        f"{result.data_tokens / median:,.0f}",
        f"{result.flops / median / 1e12:.2f}",
        "" if result.mfu is None else f"{100 * result.mfu:.1f}",
        f"{result.measurement.peak_bytes / 2**20:,.0f}",
    ]


HEADER = [
    *("ms", "vs TorchTitan's", "vs recovery", "latents/s", "data tokens/s"),
    *("TFLOP/s", "MFU %", "peak MiB"),
]


def plot(by_batch: dict[int, dict[str, Result]], file: Path) -> None:
    names = list(next(iter(by_batch.values())))
    figure = Figure(figsize=(8, 1 + 0.5 * len(names)), layout="constrained")
    panel = figure.subplots()
    height = 0.8 / len(by_batch)
    for index, (batch, results) in enumerate(by_batch.items()):
        upstream = results[UPSTREAM].measurement
        ratios = [results[name].measurement.ratio(upstream) for name in names]
        bars = panel.barh(
            [i + index * height for i in range(len(names))],
            ratios,
            height,
            label=f"local batch {batch}",
        )
        panel.bar_label(bars, fmt="%.3f", padding=3)
    panel.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], names)
    panel.invert_yaxis()
    panel.axvline(1, color="0.4", linewidth=1)
    panel.set(xlabel="time of a step relative to TorchTitan's own")
    panel.set_xlim(0, 1.15 * panel.dataLim.xmax)
    panel.legend(loc="lower left")
    figure.savefig(file, dpi=110)


def random_tokens(folder: Path, vocab_size: int) -> None:
    """Write random tokens as token shards, the same on every rank."""
    generator = np.random.default_rng(0)
    measuring.write_shard(folder, [generator.integers(vocab_size, size=2**22)], "random tokens")


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "--bag-sizes", type=int, nargs="+", default=[6, 16], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--local-batch-sizes",
        type=int,
        nargs="+",
        help="local batch sizes, in turn until one is out of memory (default: the job's)",
    )
    parser.add_argument(
        "--rounds", type=int, default=60, help="steps of each (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/benchmark"),
        help="folder of the results (default: %(default)s)",
    )
    args, arguments = parser.parse_known_args()
    measuring.be_the_only_process()
    measuring.compile_for_each_shape()
    logger.setLevel(logging.ERROR)  # hides what each trainer logs at its start
    config = SuperpositionConfigManager().parse_args(arguments)
    by_batch: dict[int, dict[str, Result]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random_tokens(folder / "tokens", model_args_of(config).vocab_size)
        for batch in args.local_batch_sizes or [config.training.local_batch_size]:
            try:
                by_batch[batch] = measure_batch(
                    arguments, folder, batch, args.bag_sizes, args.rounds
                )
            except torch.OutOfMemoryError:  # while the trainers are built
                print(f"local batch {batch}: out of memory")
                break
            free_memory()
            if any(r.measurement.out_of_memory for r in by_batch[batch].values()):
                break
    if dist.get_rank() == 0 and by_batch:
        tables = [
            measuring.table(
                [f"local batch {batch}", *HEADER], [row(name, results) for name in results]
            )
            for batch, results in by_batch.items()
        ]
        numbers = {
            batch: {name: result.json() for name, result in results.items()}
            for batch, results in by_batch.items()
        }
        measuring.write_results(args.output, "step", "\n\n".join(tables), {"by_batch": numbers})
        plot(by_batch, args.output / "step.png")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
