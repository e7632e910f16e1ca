"""The bytes of a plan's layouts against the collectives of a real step on two ranks and on four."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.planning.layout_memory import Batch
from torchtitan.experiments.tst.planning.layout_traffic import LayoutTraffic
from torchtitan.experiments.tst.planning.model_shape import Layout, shape_of
from torchtitan.experiments.tst.planning.pipeline_stages import pipeline_ranks
from torchtitan.experiments.tst.testing import ranks
from torchtitan.experiments.tst.testing.layouts import MODELS

SEQUENCES, LENGTH, ACCUMULATION = 4, 64, 2
KEYS = {
    "replicate": "data_parallel_replicate",
    "shard": "data_parallel_shard",
    "tensor": "tensor_parallel",
    "context": "context_parallel",
    "pipeline": "pipeline_parallel",
    "expert": "expert_parallel",
    "expert_tensor": "expert_tensor_parallel",
}


class CountBytes(TorchDispatchMode):
    """Bytes that this rank receives from its one peer in each group, as rings move them."""

    def __init__(self):
        super().__init__()
        self.received = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its own dispatch comes first, whose collectives count
        output = func(*args, **(kwargs or {}))
        name = func.name()
        if "c10d" not in name:
            return output
        if "allgather" in name or "all_gather" in name:
            self.received += _size(output) / 2
        elif "reduce_scatter" in name:
            self.received += (_size(args[1]) if "base" in name else _size(args[0])) / 2
        elif "allreduce" in name or "all_reduce" in name:
            self.received += _size(args[0])
        elif "all_to_all_single" in name:
            splits = args[1]
            other = sum(splits) - splits[dist.get_rank() % 2]
            self.received += _size(output) * other / max(1, sum(splits))
        elif "recv_" in name:
            self.received += _size(args[0])
        return output


def _size(tensors):
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_size, tensors)) if isinstance(tensors, list | tuple) else 0


def count(file, args):
    """Write the bytes that each rank receives in the last step, one of recovery."""

    class Counting(ranks.SyntheticTrainer):
        def train_step(self, data_iterator):
            with CountBytes() as mode:
                super().train_step(data_iterator)
            self.received = mode.received

        def before_optimizer_step(self, *args):
            pass  # whose norms of single gradients communicate

    trainer = Counting(SuperpositionConfigManager().parse_args(args))
    trainer.train()
    trainer.close()
    received = [None] * dist.get_world_size()
    dist.all_gather_object(received, trainer.received)
    if dist.get_rank() == 0:
        file.write_text(json.dumps(received))
    dist.destroy_process_group()


QUICK = [
    ("llama3", {"shard": 2}, "full"),
    ("llama3", {"tensor": 2}, "full"),
    ("qwen3", {"context": 2}, "full"),
    ("llama3", {"pipeline": 2}, "none"),
    ("qwen3 MoE", {"shard": 2, "expert": 2}, "full"),
]
SLOW = [
    ("llama3", {"shard": 2}, "none"),
    ("llama3", {"replicate": 2, "shard": 2}, "none"),
    ("llama3", {"tensor": 2}, "none"),
    ("qwen3", {"tensor": 2}, "selective"),
    ("llama3", {"context": 2}, "none"),
    ("llama3", {"shard": 2, "pipeline": 2}, "none"),
    ("qwen3 MoE", {"shard": 2, "expert": 2}, "none"),
    ("qwen3 MoE", {"tensor": 2}, "none"),
    ("qwen3 MoE", {"tensor": 2, "expert": 2}, "full"),
    ("qwen3 MoE", {"shard": 2, "tensor": 2, "expert": 2, "expert_tensor": 2}, "none"),
]


def cases():
    for case in (*QUICK, *SLOW):
        model, degrees, mode = case
        name = f"{model}: {', '.join(f'{name} {n}' for name, n in degrees.items())}, {mode}"
        yield pytest.param(*case, id=name, marks=() if case in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("model", "degrees", "mode"), cases())
def test_bytes_of_a_step(base_args, tmp_path, model, degrees, mode):
    layout = Layout(**degrees)
    job = [
        *base_args,
        *MODELS[model],
        f"--job.dump_folder={tmp_path}",
        "--training.steps=2",
        "--metrics.log_freq=1000",
        "--checkpoint.no-enable",
        "--validation.no-enable",
        "--debug.moe_force_load_balance",
        "--training.mixed_precision_param=float32",
        f"--training.seq_len={LENGTH}",
        f"--training.local_batch_size={SEQUENCES}",
        f"--training.global_batch_size={SEQUENCES * layout.data_parallel * ACCUMULATION}",
        f"--activation_checkpoint.mode={mode}",
        "--activation_checkpoint.selective_ac_option=op",
        *(f"--parallelism.{KEYS[name]}_degree={getattr(layout, name)}" for name in KEYS),
    ]
    file = tmp_path / "received.json"
    if log := ranks.run_ranks(count, layout.ranks, tmp_path, file, job):
        pytest.fail(log)
    received = max(json.loads(file.read_text()))
    config = SuperpositionConfigManager().parse_args(job)
    shape = shape_of(config)
    stages = pipeline_ranks(config, layout.pipeline, shape.layers)
    batch = Batch(SEQUENCES, ACCUMULATION, LENGTH)
    planned = LayoutTraffic(config, shape, 8).of(layout, batch, stages)
    assert sum(kind.total for kind in planned.values()) == pytest.approx(received, rel=0.02)
