"""What a model of one's own lacks, said before it trains."""

import dataclasses

import pytest
import torchtitan.protocols.train_spec as train_spec_module
from torch import nn
from torchtitan.models.llama3 import Transformer, get_train_spec, llama3_args
from torchtitan.protocols import BaseModelArgs

from jobs import ON
from torchtitan.experiments.tst.errors import ConfigError
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
