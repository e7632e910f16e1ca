"""Short runs on any number of processes, which read the same batches on any number.

A run's processes are forked from one that has imported everything, so dozens of runs take minutes.
No process uses a GPU before the fork; each process of a run initialises its own.
"""

import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for GPUs must not initialise CUDA

import torch
import torch.distributed as dist
import torchtitan.train as upstream
from torch.distributed.tensor import DTensor
from torchtitan.models.llama3 import llama3_args
from torchtitan.models.llama4 import llama4_args
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3 import qwen3_args
from typing_extensions import override

from .. import models
from ..config.manager import SuperpositionConfigManager
from ..core import IGNORE_INDEX
from ..data.demo_corpus import VOCAB_SIZE
from ..data.text import datasets
from ..training.trainer import SuperpositionTrainer
from ..upstream.cpu import enable_cpu_if_alone
from ..upstream.replaced import replace

enable_cpu_if_alone()
models.register()
datasets.register()

# Embeddings as small as the demo's: on CPU, in float32, torch's norm of a larger embedding differs
# by more than 1e-5 from the norm of its parts.
for name in ("tiny", "moe_tiny"):
    qwen3_args[name] = dataclasses.replace(qwen3_args[f"debugmodel_{name}"], vocab_size=VOCAB_SIZE)
qwen3_args["tiny_tied"] = dataclasses.replace(qwen3_args["tiny"], enable_weight_tying=True)
for attention in ("flex", "varlen"):
    llama3_args[f"demo_{attention}"] = dataclasses.replace(
        llama3_args["demo"], attn_type=attention, attn_mask_type="block_causal"
    )
# a mixture of experts that can use pipelines, unlike Qwen 3; every second layer has experts
llama4_args["tiny"] = dataclasses.replace(
    llama4_args["debugmodel"],
    dim=64,
    n_layers=4,
    n_heads=4,
    vocab_size=VOCAB_SIZE,
    attn_type="sdpa",
    attn_mask_type="causal",
    moe_args=MoEArgs(num_experts=4, use_grouped_mm=False),
)

# files of one process in the run folder
LOG = "log-{rank}.txt"
GRADIENTS = "gradient-norms-{rank}.jsonl"
LOG_END = 6000  # characters, to look at when a process fails
PATIENCE = 5.0  # seconds to wait for the other processes after one has failed

# tyro imports modules in its first call; import them before processes are forked.
SuperpositionConfigManager().parse_args(["--model.hf_assets_path=."])


class SyntheticTrainer(SuperpositionTrainer):
    """A trainer whose global batch depends only on the step; each rank takes its rows of it.

    About one token in 30 ends a document. Labels are ignored unevenly: many in the first rows, none
    in the last. The norm of each parameter's gradient is written to a file next to the metrics.
    """

    @override
    def batch_generator(self, data_iterable: Any) -> Iterator[tuple]:
        ranks, rank = 1, 0
        if self.parallel_dims.dp_enabled:
            mesh = self.parallel_dims.get_mesh("batch")
            ranks, rank = mesh.size(), mesh.get_local_rank()
        while True:
            shape = self.batch_shape(self.step)
            inputs, labels = self.global_batch(
                ranks * self.gradient_accumulation_steps * shape.sequences, shape.data_tokens
            )
            parts = zip(
                inputs.split(shape.sequences)[rank::ranks],
                labels.split(shape.sequences)[rank::ranks],
                strict=True,
            )
            for part_inputs, part_labels in parts:
                self.metrics_processor.data_loading_times.append(0.0)
                yield {"input": part_inputs.clone()}, part_labels.clone()

    def global_batch(self, sequences: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and labels, (sequences, length) each."""
        assert self.tokenizer is not None
        generator = torch.Generator().manual_seed(self.step)
        stream = torch.randint(1000, (sequences, length + 1), generator=generator)
        ends = torch.rand(stream.shape, generator=generator) < 1 / 30
        stream[ends] = self.tokenizer.eos_id
        labels = stream[:, 1:].clone()
        share = torch.linspace(0.8, 0.0, sequences)[:, None]
        labels[torch.rand(labels.shape, generator=generator) < share] = IGNORE_INDEX
        return stream[:, :-1], labels

    @override
    def before_optimizer_step(self, *args: Any) -> None:
        super().before_optimizer_step(*args)
        norms = {}
        for part in self.model_parts:
            for name, parameter in part.named_parameters():
                gradient = parameter.grad
                if isinstance(gradient, DTensor):
                    gradient = gradient.full_tensor()
                norms[_plain(name)] = gradient.double().norm().item()
        path = Path(self.job_config.job.dump_folder, GRADIENTS.format(rank=dist.get_rank()))
        with path.open("a") as file:
            print(json.dumps(norms), file=file)


def gradient_norms(folder: Path) -> list[dict[str, list[float]]]:
    """Return the norms of each parameter's gradient at each step, on all ranks that have it."""
    steps: list[dict[str, list[float]]] = []
    for path in folder.glob(GRADIENTS.format(rank="*")):
        for step, line in enumerate(path.read_text().splitlines()):
            if step == len(steps):
                steps.append({})
            for name, norm in json.loads(line).items():
                steps[step].setdefault(name, []).append(norm)
    return steps


def _plain(name: str) -> str:
    """Return a parameter's name without the names of wrappers."""
    return re.sub(r"_orig_mod\.|_checkpoint_wrapped_module\.", "", name)


def run(args: Sequence[str], processes: int, folder: Path) -> str | None:
    """Train a job by :func:`run_ranks`.

    Args:
        args: arguments of the job, as on the command line.
        processes: number of processes.
        folder: folder of the run.
    """
    return run_ranks(train, processes, folder, [*args, f"--job.dump_folder={folder}"])


def train(args: Sequence[str]) -> None:
    """Train a job in this process, one of those that torchrun would start."""
    replace(upstream.time, "sleep", lambda seconds: None)  # upstream waits at the end
    replace(upstream, "ConfigManager", SuperpositionConfigManager)
    sys.argv = ["", *args]
    upstream.main(SyntheticTrainer)


def run_ranks(
    function: Callable[..., None], processes: int, folder: Path, *args: Any
) -> str | None:
    """Call a function in many processes, in the environment that torchrun would give them.

    Args:
        function: a function of a module that can be imported.
        processes: number of processes.
        folder: folder of the logs.
        args: arguments of the function.

    Returns:
        How a process failed and the end of its log; None if none failed.
    """
    # like torchrun's, so that no rank has to wait for the rank that would own the store
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = [
        process_of_rank(rank, processes, store, folder, function, *args)
        for rank in range(processes)
    ]
    for process in ranks:
        process.start()
    failed = patience = None
    waiting = dict(enumerate(ranks))
    while waiting:
        if not multiprocessing.connection.wait([p.sentinel for p in waiting.values()], patience):
            break
        for rank, process in list(waiting.items()):
            if process.exitcode is not None:
                del waiting[rank]
                if process.exitcode and failed is None:
                    failed, patience = rank, PATIENCE
    for process in waiting.values():
        process.kill()
    for process in ranks:
        process.join()
    if failed is None:
        return None
    log = (folder / LOG.format(rank=failed)).read_text()[-LOG_END:]
    return f"rank {failed} ended with {ranks[failed].exitcode}\n{log}"


def process_of_rank(
    rank: int,
    processes: int,
    store: dist.TCPStore,
    folder: Path,
    function: Callable[..., None],
    *args: Any,
) -> ForkServerProcess:
    """Return one process of :func:`run_ranks`, not started; all share the ``store``."""
    folder.mkdir(parents=True, exist_ok=True)
    _start_fork_server()
    arguments = (rank, processes, store.port, folder, function, *args)
    return ForkServerProcess(target=_rank, args=arguments)


def _start_fork_server() -> None:
    preload = [__name__, "scipy.io"]  # datasets imports scipy.io to read a file
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    multiprocessing.forkserver.ensure_running()


def _rank(
    rank: int, processes: int, port: int, folder: Path, function: Callable[..., None], *args: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        # compiled code contains the names of process groups, which differ from run to run
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
    }
    torch.set_num_threads(1)
    with (folder / LOG.format(rank=rank)).open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    function(*args)


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
