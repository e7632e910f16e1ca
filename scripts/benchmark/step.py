"""Time a step of each phase against a plain PyTorch step, side by side in one process.

The model and batch are those of a job (its arguments, --job.config_file ...); the data are random
tokens, so that the loader does not count. Plain: the same model without anything of torchtitan's
around it, loss.backward(), clip_grad_norm_, AdamW. Medians of interleaved rounds.

    python scripts/benchmark_step.py --job.config_file train_configs/demo/tst.toml
"""

import argparse
import copy
import os
import random
import statistics
import time
from collections.abc import Callable

import torch

from torchtitan.experiments.tst.device import enable_cpu_if_alone

enable_cpu_if_alone()

from torch.nn.utils import clip_grad_norm_  # noqa: E402
from torchtitan.components.loss import cross_entropy_loss  # noqa: E402
from torchtitan.tools.utils import device_module  # noqa: E402

from torchtitan.experiments.tst import models  # noqa: E402, F401
from torchtitan.experiments.tst.data import datasets  # noqa: E402, F401
from torchtitan.experiments.tst.job_config import SuperpositionConfigManager  # noqa: E402
from torchtitan.experiments.tst.trainer import Batch, SuperpositionTrainer  # noqa: E402


class PlainLoop:
    """An ordinary training step in plain PyTorch, on its own copy of the trainer's model."""

    def __init__(self, trainer: SuperpositionTrainer):
        config = trainer.job_config
        self.device, self.max_norm = trainer.device, config.training.max_norm
        self.autocast = trainer.maybe_enable_amp
        self.model = copy.deepcopy(trainer.model_parts[0])
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optimizer.lr,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )

    def step(self, batch: Batch) -> None:
        """Forward, backward, clip, update."""
        inputs, labels = batch[0]["input"].to(self.device), batch[1].to(self.device)
        with self.autocast:
            loss = cross_entropy_loss(self.model(inputs), labels) / labels.numel()
        loss.backward()
        clip_grad_norm_(self.model.parameters(), self.max_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()


def random_batch(trainer: SuperpositionTrainer, step: int) -> Batch:
    shape = trainer.batch_shape(step)
    vocab_size = trainer.model_args.vocab_size
    stream = torch.randint(vocab_size, (shape.sequences, shape.data_tokens + 1))
    return {"input": stream[:, :-1].contiguous()}, stream[:, 1:].contiguous()


def seconds(run: Callable[[], None]) -> float:
    device_module.synchronize()
    begin = time.perf_counter()
    run()
    device_module.synchronize()
    return time.perf_counter() - begin


def be_the_only_process() -> None:
    """The environment of a launch with one process, where ``torchrun`` has not set it."""
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    args, job_args = parser.parse_known_args()
    be_the_only_process()
    config = SuperpositionConfigManager().parse_args(job_args)
    # upstream's step waits for its metrics; a plain loop has none
    config.checkpoint.enable = config.validation.enable = config.metrics.enable_tensorboard = False
    config.metrics.log_freq = 10**9
    config.training.global_batch_size = -1
    trainer = SuperpositionTrainer(config)
    if not trainer.schedule.enabled:
        parser.error("the job has no superposition phase")
    plain = PlainLoop(trainer)
    phases = {"superposition": 2, "recovery": trainer.schedule.boundary + 2}
    batches = {name: random_batch(trainer, step) for name, step in phases.items()}

    def phase_step(name: str) -> None:
        trainer.step = phases[name]
        inputs, labels = batches[name]
        trainer.train_step(iter([(dict(inputs), labels)]))

    runs: dict[str, Callable[[], None]] = {
        "plain": lambda: plain.step(batches["recovery"]),
        "recovery": lambda: phase_step("recovery"),
        "superposition": lambda: phase_step("superposition"),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    warmup = 5
    for round_ in range(warmup + args.rounds):
        for name in random.sample(list(runs), len(runs)):  # none always after the same other
            elapsed = seconds(runs[name])
            if round_ >= warmup:
                times[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, value in median.items():
        print(f"{name:14} {1e3 * value:8.2f} ms a step (median of {args.rounds})")
    print(f"superposition : recovery  {median['superposition'] / median['recovery']:.3f}")
    print(f"recovery : plain PyTorch  {median['recovery'] / median['plain']:.3f}")
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
