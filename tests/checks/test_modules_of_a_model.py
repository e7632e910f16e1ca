"""What a model of one's own lacks, said before it trains."""

import dataclasses

import pytest
import torch
import torchtitan.protocols.train_spec as train_spec_module
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import weight_norm
from torchtitan.experiments.simple_fsdp.llama3.parallelize import (
    parallelize_llama as parallelize_with_simple_fsdp,
)
from torchtitan.models.llama3 import Transformer, get_train_spec, llama3_args
from torchtitan.protocols import BaseModelArgs
from torchtitan.tools.utils import device_type

from jobs import ON
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.planning.dry_run import dry_run
from torchtitan.experiments.tst.start import check
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer


class OtherNames(Transformer):
    def __init__(self, args):
        super().__init__(args)
        self.embedding = self.tok_embeddings
        del self.tok_embeddings


class Biased(Transformer):
    def __init__(self, args):
        super().__init__(args)
        self.output = nn.Linear(args.dim, args.vocab_size)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 8 * super().forward(ids)


class ScaledEmbedding(Transformer):
    def __init__(self, args):
        super().__init__(args)
        self.tok_embeddings = Scaled(args.vocab_size, args.dim)


class Hooked(Transformer):
    def __init__(self, args):
        super().__init__(args)
        self.tok_embeddings.register_forward_hook(lambda module, ids, output: 8 * output)


class NormedHead(Transformer):
    def __init__(self, args):
        super().__init__(args)
        weight_norm(self.output)


class WithoutPositions(Transformer):
    def forward(self, tokens, attention_masks=None):
        return super().forward(tokens, attention_masks)


class SoftCap(Transformer):
    def forward(self, tokens, attention_masks=None, positions=None):
        return 30 * torch.tanh(super().forward(tokens, attention_masks, positions) / 30)


class WithoutHead(Transformer):
    def __init__(self, args):
        super().__init__(args)
        self.head = self.output
        del self.output


@dataclasses.dataclass
class Bare(BaseModelArgs):
    def update_from_config(self, job_config, **kwargs): ...


class WithoutLayers(Bare):
    vocab_size = 1024


@pytest.fixture
def own(monkeypatch, make_config):
    """A job of a model that is registered as "own"."""

    def register(*args, model=Transformer, model_args=llama3_args["demo"]):
        spec = dataclasses.replace(
            get_train_spec(), model_cls=model, model_args={"demo": model_args}
        )
        monkeypatch.setattr(train_spec_module, "_extra_train_specs", {"own": spec})
        return make_config(*ON, "--model.name=own", *args)

    return register


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (ScaledEmbedding, (), r"^model.name = 'own': its tok_embeddings, Scaled, has a forward of"),
        (Hooked, (), r"its tok_embeddings, Embedding, has a forward hook, which bags would not"),
        (NormedHead, ("--lm_head.chunks=2",), r"^lm_head.chunks = 2: must be 1: .* no plain"),
        (OtherNames, (), r"^model.name = 'own': has no nn.Embedding named tok_embeddings"),
        (Biased, ("--lm_head.chunks=2",), r"^lm_head.chunks = 2: must be 1: model.name = 'own'"),
        (WithoutHead, ("--lm_head.chunks=2",), r"^lm_head.chunks = 2: must be 1: .* named output"),
    ],
)
def test_modules(own, one_process, model, args, message):
    """The checks say it, and the trainer where they are not run."""
    job = own(*args, model=model)
    with pytest.raises(ConfigError, match=message):
        check(job, 1)
    with pytest.raises(ConfigError, match=message):
        SuperpositionTrainer(job)


def test_chunks_are_not_needed(own):
    check(own(model=Biased), 1)
    check(own("--lm_head.chunks=2"), 1)


def test_fields_of_the_model_args(own):
    with pytest.raises(ConfigError, match=r"^model.flavor = 'demo': its model args have no vocab"):
        check(own(model_args=Bare()), 1)
    pipeline = "--parallelism.pipeline_parallel_degree=2"
    with pytest.raises(ConfigError, match=r"pipeline_parallel_degree = 2: must be 1: .* n_layers"):
        check(own(pipeline, model_args=WithoutLayers()), 2)


def test_the_loss_of_chunks_is_returned_as_it_is(own, one_process):
    """A soft cap of logits would cap the loss."""
    cap = r"^lm_head.chunks = 2: must be 1: forward of model.name = 'own' does not return"
    with pytest.raises(ConfigError, match=cap):
        SuperpositionTrainer(own("--lm_head.chunks=2", model=SoftCap)).train()


def test_a_soft_cap_without_chunks(own, one_process):
    trainer = SuperpositionTrainer(own("--training.steps=4", model=SoftCap))
    trainer.train()
    trainer.close()


def test_positions_for_context_parallelism(own):
    context = "--parallelism.context_parallel_degree=2"
    check(own(context), 2)
    with pytest.raises(ConfigError, match=r"must be 1: forward of model.name = 'own' has no arg"):
        check(own(context, model=WithoutPositions), 2)


@pytest.mark.parametrize(
    "kind", ["data_parallel_shard", "data_parallel_replicate", "tensor_parallel"]
)
def test_a_model_that_is_not_made_parallel(own, kind):
    """Ranks would train different weights, or do the same work."""
    job = own(f"--parallelism.{kind}_degree=2", "--parallelism.data_parallel_shard_degree=-1")
    spec = train_spec_module._extra_train_specs["own"]
    assert dry_run(job, 2).untraced == ""
    spec.parallelize_fn = lambda model, parallel_dims, job_config: model
    message = rf"^parallelism.{kind}_degree = -?\d: must be 1: parallelize_fn of model.name = 'own'"
    with pytest.raises(ConfigError, match=message):
        dry_run(job, 2)


def fully_shard_one_layer(model, parallel_dims, job_config):
    return fully_shard(model.layers["0"], mesh=parallel_dims.get_mesh("fsdp")) and model


def fully_shard_without_replicas(model, parallel_dims, job_config):
    return fully_shard(model, mesh=parallel_dims.get_mesh("fsdp"))


@pytest.mark.parametrize(
    ("parallelize", "kind"),
    [
        (fully_shard_one_layer, "shard"),
        (fully_shard_without_replicas, "replicate"),
    ],
)
def test_a_model_that_is_parallel_in_part(own, parallelize, kind):
    """Ranks would train different weights of a layer that is not sharded."""
    job = own("--parallelism.data_parallel_replicate_degree=2")
    train_spec_module._extra_train_specs["own"].parallelize_fn = parallelize
    message = rf"^parallelism.data_parallel_{kind}_degree = .* apply it to the parameter tok_emb"
    with pytest.raises(ConfigError, match=message):
        dry_run(job, 4)


def fully_shard_on_a_mesh_of_ones_own(model, parallel_dims, job_config):
    mesh = init_device_mesh(device_type, (2, 2), mesh_dim_names=("nodes", "gpus"))
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize(
    "parallelize",
    [parallelize_with_simple_fsdp, fully_shard_on_a_mesh_of_ones_own],
)
def test_a_model_that_another_function_makes_parallel(own, parallelize):
    """Simple FSDP has DTensors, and no modules of FSDP2."""
    job = own("--parallelism.data_parallel_replicate_degree=2")
    train_spec_module._extra_train_specs["own"].parallelize_fn = parallelize
    assert dry_run(job, 4).untraced == ""


def test_frozen_parameters_need_no_mesh(own):
    def parallelize(model, parallel_dims, job_config):
        model.norm.requires_grad_(False)
        mesh = parallel_dims.get_mesh("fsdp")
        return fully_shard(model, mesh=mesh, ignored_params=set(model.norm.parameters()))

    job = own()
    train_spec_module._extra_train_specs["own"].parallelize_fn = parallelize
    dry_run(job, 2)  # not refused
