"""The trainer for TorchTitan 0.3: upstream's own steps, the boundary, data, checkpoints."""

import dataclasses
import re
import shutil
from unittest import mock

import pytest
import torch
from jobs_of_03 import B, L, S, built, ordinary, saving, train, tst
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss, MSELoss
from torchtitan.config import ConfigManager
from torchtitan.hf_datasets.text_datasets import (
    HuggingFaceTextDataLoader,
    InterleavedHuggingFaceTextDataLoader,
)
from torchtitan.models.common import Embedding
from torchtitan.trainer import Trainer

from torchtitan.experiments.tst.core import IGNORE_INDEX, BagLoss, fold
from torchtitan.experiments.tst.errors import ArgumentError, ConfigError, ConfigTextError
from torchtitan.experiments.tst.metrics_file import read_metrics
from torchtitan.experiments.tst.titan03 import trainer as module
from torchtitan.experiments.tst.titan03.checks import check_config, check_parts
from torchtitan.experiments.tst.titan03.trainer import SuperpositionTrainer

MODELS = ["llama3", "qwen3_moe"]


@pytest.mark.parametrize("model", MODELS)
def test_without_bags_every_loss_is_upstreams(model, tmp_path, corpus):
    """20 steps, bit for bit."""
    config = ordinary(tmp_path / "upstream", corpus, model, steps=20)
    ours = tst(dataclasses.replace(config, dump_folder=str(tmp_path / "ours")), bag_size=1)
    upstreams, found = train(config), train(ours)
    assert len(found.losses) == 20
    assert (found.losses, found.norms) == (upstreams.losses, upstreams.norms)


@pytest.mark.parametrize("model", MODELS)
def test_upstream_continues_from_the_boundary(model, tmp_path, corpus):
    """TorchTitan's own trainer takes the checkpoint, and every loss is the same bit for bit."""
    config = ordinary(tmp_path / "tst", corpus, model)
    config.checkpoint = saving(100)
    whole = train(tst(config))
    assert {path.name for path in (tmp_path / "tst/checkpoint").iterdir()} == {"step-3", "step-6"}
    folder = tmp_path / "upstream"
    shutil.copytree(tmp_path / "tst/checkpoint/step-3", folder / "checkpoint/step-3")
    continued = train(dataclasses.replace(config, dump_folder=str(folder)))
    assert list(continued.losses) == [4, 5, 6]
    assert continued.losses == {step: whole.losses[step] for step in (4, 5, 6)}
    assert continued.norms == {step: whole.norms[step] for step in (4, 5, 6)}
    assert all(map(torch.equal, continued.read[0], whole.read[3]))


def test_no_token_is_lost_or_repeated(tmp_path, corpus):
    """The tokens of both phases are those that upstream reads, in their order."""
    whole = train(tst(ordinary(tmp_path / "a", corpus))).read
    assert [inputs.shape for inputs, _ in whole] == [(B, S * L)] * 3 + [(B, L)] * 3
    upstream = train(ordinary(tmp_path / "b", corpus, steps=15)).read
    for part in range(2):
        found = torch.cat([batch[part].flatten() for batch in whole])
        assert torch.equal(found, torch.cat([batch[part].flatten() for batch in upstream]))


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_is_the_same(stop, tmp_path, corpus):
    config = ordinary(tmp_path / "whole", corpus)
    config.checkpoint = saving()
    whole = train(tst(config))
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / f"whole/checkpoint/step-{stop}", folder / f"checkpoint/step-{stop}")
    resumed = train(tst(dataclasses.replace(config, dump_folder=str(folder))))
    assert resumed.losses == {step: whole.losses[step] for step in range(stop + 1, 7)}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"bag_size": 8}, "bags of 4 in steps 1 to 2 (mode full, scale sequence), and "),
        ({"steps": 1}, "has bags of 4 in steps 1 to 1"),
        ({"bag_size": 1}, "has no bags"),
    ],
)
def test_a_resume_with_other_bags_is_refused(keys, words, tmp_path, corpus):
    config = ordinary(tmp_path, corpus)
    config.checkpoint = saving()
    train(tst(config))
    for step in (3, 4, 5, 6):
        shutil.rmtree(tmp_path / f"checkpoint/step-{step}")
    with pytest.raises(ConfigTextError, match=re.escape(words)):
        train(tst(config, **keys))
    assert list(train(tst(config, steps=5)).losses) == [3, 4, 5, 6]  # later steps may change


def test_the_loss_is_one_mean_over_all_targets(tmp_path, corpus):
    """Two micro-batches and one give the same loss and gradient."""
    config = ordinary(tmp_path / "a", corpus, local_batch_size=4)
    halves = ordinary(tmp_path / "b", corpus, local_batch_size=2, global_batch_size=4)
    one, two = (train(tst(job, weighting="power_law")) for job in (config, halves))
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert two.norms == pytest.approx(one.norms, rel=1e-4)


def test_the_first_loss_is_that_of_the_paper(tmp_path, corpus):
    config = tst(ordinary(tmp_path, corpus, steps=2), steps=1)
    with built(config) as trainer:
        read = []
        batches = trainer.batch_generator(trainer.dataloader)
        trainer.step = 1
        read.append(next(batches))
        inputs, labels = fold(read[0][0]["input"], read[0][1], S)
        positions = torch.arange(L).expand(B, L).contiguous()
        model = trainer.model_parts[0]
        masks = model.get_attention_masks(positions=positions)
        with trainer.train_context():
            logits = model(inputs, positions=positions, attention_masks=masks)
        expected = BagLoss()(logits, labels).item()
    assert (labels == IGNORE_INDEX).sum() == B * (S - 1)
    assert train(config).losses[1] == pytest.approx(expected, rel=1e-6)


def test_chunks_do_not_change_the_loss(tmp_path, corpus):
    config = ordinary(tmp_path / "a", corpus)
    chunked = ordinary(tmp_path / "b", corpus)
    chunked.loss = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=chunked.loss)
    whole, in_chunks = train(tst(config)), train(tst(chunked))
    assert in_chunks.losses == pytest.approx(whole.losses, rel=1e-5)
    assert in_chunks.norms == pytest.approx(whole.norms, rel=1e-4)


def test_a_graph_is_captured_anew_for_each_shape(tmp_path, corpus):
    """Without a GPU, only the calls are seen: the old graph and its gradients are gone first."""
    calls: list[str] = []
    config = tst(ordinary(tmp_path, corpus), bag_size=[4, 2], steps=[1, 2])
    with built(config) as trainer:

        def wrap(body):
            assert body == trainer._forward_backward_body
            assert all(p.grad is None for p in trainer.model_parts[0].parameters())
            calls.append("wrap")
            return body

        with (
            mock.patch.object(module, "wrap_with_cuda_graph", wrap),
            mock.patch.object(module, "cudagraph_teardown", lambda: calls.append("teardown")),
        ):
            trainer.train()
    assert calls == ["teardown", "wrap"] * 2


def test_the_boundary_checkpoint_is_never_deleted(tmp_path, corpus):
    config = ordinary(tmp_path, corpus, steps=9)
    config.checkpoint = saving(2, keep_latest_k=2)
    with built(tst(config)) as trainer:
        trainer.train()
        purged = []
        with mock.patch.object(trainer.checkpointer.purge_queue, "put", purged.append):
            trainer.checkpointer._purge_stale_checkpoints()
        trainer.checkpointer.purge_thread.join(0)
    left = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert {"step-3", "step-9"} <= left
    assert not any(path.endswith("step-3") for path in purged)


def test_a_run_may_stop_at_the_boundary(tmp_path, corpus):
    config = ordinary(tmp_path, corpus)
    config.checkpoint = saving(100)
    assert list(train(tst(config, stop_at_boundary=True)).losses) == [1, 2, 3]
    assert list(train(tst(config)).losses) == [4, 5, 6]


def test_metrics_have_the_phases(tmp_path, corpus):
    config = ordinary(tmp_path, corpus)
    config.metrics.log_freq = 100  # the steps around the boundary are logged in any case
    config.validator = dataclasses.replace(config.validator, enable=True, freq=3, steps=1)
    train(tst(config))
    lines = read_metrics(tmp_path)
    training = {line["step"]: line for line in lines if "loss_metrics/global_avg_loss" in line}
    assert list(training) == [1, 3, 4]
    assert [line["phase"] for line in training.values()] == ["superposition"] * 2 + ["recovery"]
    assert [line["bag_size"] for line in training.values()] == [S, S, 1]
    tokens = [B * L * S, 3 * B * L * S, 3 * B * L * S + B * L]
    assert [line["n_tokens_seen"] for line in training.values()] == tokens
    assert [line["n_latents_seen"] for line in training.values()] == [B * L, 3 * B * L, 4 * B * L]
    validated = {line["step"]: line for line in lines if "validation_metrics/loss" in line}
    assert list(validated) == [1, 3, 6]
    assert validated[6]["n_tokens_seen"] == 3 * B * L * S + 3 * B * L


def test_validation_is_the_loss_of_next_tokens(tmp_path, corpus):
    """In superposition too: with the weights of the start, it is upstream's validation."""
    losses = []
    for name in ("upstream", "tst"):
        config = ordinary(tmp_path / name, corpus)
        config.validator = dataclasses.replace(config.validator, enable=True, steps=2)
        with built(config if name == "upstream" else tst(config)) as trainer:
            with mock.patch.object(trainer.metrics_processor, "log_validation") as log:
                trainer.validator.validate(trainer.model_parts, step=1)
            losses.append(log.call_args.kwargs["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("keys", [{"mode": "input"}, {"mode": "output"}, {"scale": "batch"}])
def test_other_modes_and_scales_train(keys, tmp_path, corpus):
    read = train(tst(ordinary(tmp_path, corpus), **keys)).read
    shapes = {"input": (B, S * L), "output": (B, L), "batch": (S * B, L)}
    assert read[0][0].shape == shapes[next(iter(keys.values()))]
    assert read[3][0].shape == (B, L)


def test_the_last_incomplete_batch_ends_the_run(tmp_path, corpus):
    """Windows of another batch size cannot be joined: the data is at its end."""
    with built(tst(ordinary(tmp_path, corpus))) as trainer:
        trainer.step = 1
        whole = ({"input": torch.zeros(B, L)}, torch.zeros(B, L))
        part = ({"input": torch.zeros(1, L)}, torch.zeros(1, L))
        with pytest.raises(DataloaderExhaustedError):
            next(trainer._joined(iter([whole, whole, whole, part])))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (InterleavedHuggingFaceTextDataLoader.Config(), "Interleaved.*do not follow each other"),
        (HuggingFaceTextDataLoader.Config(num_workers=2), "num_workers = 2: must be at most 1"),
    ],
)
def test_windows_that_do_not_follow_each_other_are_refused(loader, message, tmp_path, corpus):
    config = dataclasses.replace(ordinary(tmp_path, corpus), dataloader=loader)
    with pytest.raises(ConfigError, match=message):
        check_config(tst(config))
    check_config(tst(config, bag_size=1))  # upstream's own run


def test_every_stage_must_fit_the_layout(tmp_path, corpus):
    config = ordinary(tmp_path, corpus, seq_len=24)
    config.loss = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=config.loss)
    check_config(tst(config, bag_size=3, steps=2, scale="batch"))
    with pytest.raises(ConfigError, match="gives sequences of 6, which must be a multiple of 4"):
        check_config(tst(config, bag_size=[3, 4], steps=[2, 2], scale="batch"))
    config.loss = CrossEntropyLoss.Config()
    config.parallelism = dataclasses.replace(config.parallelism, context_parallel_degree=2)
    with pytest.raises(ConfigError, match="must be a multiple of 256"):
        check_config(tst(config))


def test_an_override_of_our_parts_is_refused(tmp_path, corpus):
    config = tst(ordinary(tmp_path, corpus))
    with built(config) as trainer:
        check_parts(trainer)
        trainer.model_parts[0].tok_embeddings = Embedding.Config(
            num_embeddings=8, embedding_dim=4
        ).build()
        with pytest.raises(ConfigError, match=r"override.imports = \[\]: must not replace"):
            check_parts(trainer)


def test_flops_are_those_of_the_latents(tmp_path, corpus):
    """With scale "batch" a sequence is shorter, and attention cheaper."""
    with built(tst(ordinary(tmp_path, corpus, steps=2), steps=1, scale="batch")) as trainer:
        model, flops = trainer.model_parts[0], []
        log = trainer.metrics_processor.log
        with mock.patch.object(trainer.metrics_processor, "log") as recorded:
            recorded.side_effect = lambda *args, **kwargs: (
                flops.append(trainer.metrics_processor.num_flops_per_token),
                log(*args, **kwargs),
            )
            trainer.train()
        of = [trainer.model_config.get_nparams_and_flops(model, n)[1] for n in (L // S, L)]
    assert flops == of and of[0] < of[1]


def test_a_config_is_not_changed(tmp_path, corpus):
    config = ordinary(tmp_path, corpus)
    before = config.to_dict()
    assert type(tst(config)) is SuperpositionTrainer.Config
    assert config.to_dict() == before


def test_what_bags_would_change_is_refused(tmp_path, corpus):
    config = ordinary(tmp_path, corpus)
    other_loss = dataclasses.replace(config, loss=MSELoss.Config())
    with pytest.raises(ArgumentError, match=r"loss MSELoss.Config: must be CrossEntropyLoss"):
        tst(other_loss)

    class Other(Trainer):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(Trainer.Config):
            pass

    with pytest.raises(ArgumentError, match="must be a Trainer"):
        tst(Other.Config(model_spec=config.model_spec))


@pytest.mark.parametrize(
    ("keys", "change", "message"),
    [
        ({"steps": 6}, {}, "superposition.steps = 6: 6 superposition steps must be fewer"),
        ({"step_ratio": 0.5}, {}, "give one of the two"),
        ({"reinit_at_recovery": ["output"]}, {}, "needs TorchTitan 0.2.2"),
        ({}, {"spmd_backend": "full_dtensor"}, "must be spmd_types or partial_dtensor"),
        ({"scale": "batch"}, {"pipeline_parallel_degree": 2}, 'must be "sequence" with pipeline'),
    ],
)
def test_a_config_that_cannot_run_is_refused_early(keys, change, message, tmp_path, corpus):
    config = ordinary(tmp_path, corpus)
    config.training.disable_cuda_graphs = True
    config.parallelism = dataclasses.replace(config.parallelism, **change)
    with pytest.raises(ConfigError, match=message):
        SuperpositionTrainer(tst(config, **keys))
    assert not torch.distributed.is_initialized()


def test_the_command_line_of_upstream_has_our_keys(tmp_path):
    """``--superposition.bag_size 8,4`` too, which is written as on 0.2.2."""
    registry = "torchtitan.experiments.tst.titan03"
    arguments = ["--superposition.bag_size", "8,4", "--superposition.step_ratio", "0.4,0.2"]
    config = ConfigManager().parse_args(
        [f"--module={registry}", "--config=llama3_debugmodel", *arguments]
    )
    assert type(config) is SuperpositionTrainer.Config
    stages = check_config(config).stages
    assert [(stage.bag_size, stage.first, stage.last) for stage in stages] == [(8, 1, 4), (4, 5, 6)]


def test_keys_that_documents_name_exist(tmp_path, corpus):
    """Those in KEYS_OF_03 of tests/docs/test_pages.py."""
    config = ordinary(tmp_path, corpus)
    assert config.parallelism.spmd_backend == "spmd_types"
    assert config.debug.spmd_typechecking is False
    assert config.training.disable_cuda_graphs is False
