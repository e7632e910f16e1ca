"""Parallelisms on fake tensors: replacements for those that read values.

Context and tensor parallelism, FSDP and pipeline schedules run unchanged.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.distributed import pipeline_parallel
from torchtitan.distributed.expert_parallel import ExpertParallel
from torchtitan.models.llama3.infra import parallelize
from torchtitan.models.moe.utils import _permute

from .fake_pipeline import SimulatedStage
from .replaced import replaced


@dataclasses.dataclass
class Routing:
    """The routers' choices under expert parallelism.

    Attributes:
        top_k: number of experts of a token.
        worst: whether each token goes to as many of this rank's experts as possible; otherwise the
            experts of each rank receive the same number.
    """

    top_k: int = 1
    worst: bool = False

    def splits(self, choices: int, ranks: int, local_experts: int) -> tuple[list[int], list[int]]:
        """Return how many rows rank 0 sends to each rank, and how many it receives from each.

        Args:
            choices: rows that each rank sends: its tokens times ``top_k``.
            ranks: number of expert-parallel ranks.
            local_experts: number of experts of a rank. A token chooses different experts, so at
                most ``min(top_k, local_experts)`` of this rank's.
        """
        if self.worst:
            to_first = choices * min(self.top_k, local_experts) // self.top_k
            return [to_first, *_even(choices - to_first, ranks - 1)], [to_first] * ranks
        sent = _even(choices, ranks)
        return sent, [sent[0]] * ranks


def _even(rows: int, parts: int) -> list[int]:
    """Divide rows into parts; the first parts get one more if they do not divide evenly."""
    return [rows // parts + (part < rows % parts) for part in range(parts)]


@contextlib.contextmanager
def parallel_stand_ins(routing: Routing) -> Iterator[None]:
    """Replace in this context what parallelisms cannot do without values.

    Args:
        routing: routing of the experts; its values are read when a step is simulated.
    """

    def dispatch(self: Any, module: Any, inputs: Any, mesh: DeviceMesh) -> Any:
        return _dispatch(self, routing, inputs, mesh)

    with (
        replaced(ExpertParallel, "_token_dispatch", dispatch),
        replaced(parallelize, "replicate", _replicate),
        replaced(pipeline_parallel, "PipelineStage", SimulatedStage),
    ):
        yield


def _dispatch(
    parallel: Any, routing: Routing, inputs: Any, mesh: DeviceMesh
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what ``ExpertParallel._token_dispatch`` does, which reads the splits from the counts.

    Args:
        parallel: the parallel style; it stores what the way back needs.
        routing: gives the splits instead of the counts.
        inputs: rows (tokens * top_k, d) of this rank, and their number for each expert (experts,).
        mesh: mesh of expert parallelism.
    """
    rows, counts = inputs
    group, ranks = mesh.get_group(), mesh.shape[0]
    local_experts = counts.shape[0] // ranks
    with torch.no_grad():
        counts = collectives.all_to_all_single(counts, None, None, group)
    sent, received = routing.splits(rows.shape[0], ranks, local_experts)
    parallel.input_splits, parallel.output_splits = sent, received
    rows = collectives.all_to_all_single_autograd(rows, received, sent, group)
    parallel.input_shape, rows, parallel.permuted_indices, counts = _permute(
        rows, counts, ranks, local_experts
    )
    return rows, counts


def _replicate(model: nn.Module, *, gradient_as_bucket_view: bool = False, **kwargs: Any) -> None:
    """Stand in for DDP, whose reducer reads the addresses of parameters.

    Its memory is a buffer: buckets of all gradients, unless gradients are views of the buckets.
    """
    if not gradient_as_bucket_view:
        size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        buckets = torch.empty(size, dtype=torch.uint8, device="meta")
        model.register_buffer("gradient_buckets", buckets, persistent=False)
    ddp: Any = model
    ddp.register_comm_hook = lambda *args: None  # parallelize() recognizes DDP by it
