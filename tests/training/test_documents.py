"""Attention within documents (``attn_mask_type = "block_causal"``) over bags."""

import dataclasses
import json
import shutil

import pytest
import torch
from torchtitan.models.llama3 import llama3_args

from torchtitan.experiments.tst.checks.job import check_job
from torchtitan.experiments.tst.errors import ConfigError
from torchtitan.experiments.tst.metrics_file import TRAINING_LOSS
from torchtitan.experiments.tst.training.trainer import SuperpositionTrainer

LATENTS, BAG = 8, 4
ON = (f"--superposition.bag_size={BAG}", "--superposition.steps=3")


@pytest.fixture
def flavor(monkeypatch):
    """The demo's model with attention within documents."""
    flex = dataclasses.replace(llama3_args["demo"], attn_type="flex", attn_mask_type="block_causal")
    monkeypatch.setitem(llama3_args, "demo_flex", flex)
    return "--model.flavor=demo_flex"


@pytest.fixture
def logits(make_config, one_process, flavor):
    """Of bags (1, LATENTS, BAG), as the trainer hands them to the model; and the token EOS."""
    trainer = SuperpositionTrainer(make_config(*ON, flavor))

    def run(bags):
        labels = torch.zeros_like(bags)
        inputs, _, _, kwargs = trainer.post_dataloading_process({"input": bags}, labels)
        return trainer.model_parts[0](inputs, **kwargs).detach()

    yield run, trainer.tokenizer.eos_id
    trainer.close()


@pytest.mark.parametrize("offset", range(BAG))
def test_a_bag_belongs_to_the_document_of_its_first_token(logits, offset):
    run, eos = logits
    torch.manual_seed(0)
    bags = torch.randint(10, 1000, (1, LATENTS, BAG))
    bags[0, 2, offset] = eos  # in bag 2 ends the first document, and bag 3 begins the second
    before = run(bags)

    def sees(changed_bag):
        changed = bags.clone()
        changed[0, changed_bag, (offset + 1) % BAG] += 1
        return (run(changed) != before).any(-1)[0].tolist()

    assert sees(0) == [True, True, True, False, False, False, False, False]
    assert sees(2) == [False, False, True, False, False, False, False, False]
    assert sees(3) == [False, False, False, True, True, True, True, True]


@pytest.mark.parametrize("attention", ["flex", "varlen"])
def test_documents_without_an_end_are_refused_at_the_start(
    make_config, corpus, tmp_path, monkeypatch, attention
):
    folder = shutil.copytree(corpus / "tokenizer", tmp_path / "assets")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|begin_of_text|>"}')
    tokenizer = f"--model.hf_assets_path={folder}"
    for mask, refused in (("block_causal", True), ("causal", False)):
        model = dataclasses.replace(llama3_args["demo"], attn_type=attention, attn_mask_type=mask)
        monkeypatch.setitem(llama3_args, "other", model)
        config = make_config(tokenizer, "--model.flavor=other")
        if refused:
            with pytest.raises(ConfigError, match=r"model.flavor = 'other': .*EOS") as error:
                check_job(config)
            assert f"model.hf_assets_path = {str(folder)!r} has none" in str(error.value)
        else:
            check_job(config)


def test_documents_that_begin_with_their_end_train(train, flavor, corpus, tmp_path):
    """BOS and EOS are one token, as in GPT-2's tokenizer."""
    folder = shutil.copytree(corpus / "tokenizer", tmp_path / "assets")
    both = {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(both))
    lines = train(*ON, flavor, "--training.steps=4", f"--model.hf_assets_path={folder}")
    assert len(lines) == 4


def test_both_phases_train(train, flavor):
    """In recovery a token belongs to its document, as TorchTitan has it."""
    args = ("--superposition.steps=10", "--training.steps=20", "--optimizer.lr=1e-2")
    losses = [line[TRAINING_LOSS] for line in train(*ON, *args, flavor)]
    assert losses[9] < losses[0] - 0.5
    assert max(losses[10:]) < losses[0] - 0.5
