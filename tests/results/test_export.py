"""Exported models are those that were trained, for transformers and for the LM-Eval harness."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
import torchtitan.protocols.train_spec as train_spec_module
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import load_full, saving, superposition
from tasks import TEXT, write_task
from torchtitan.experiments.tst import paper
from torchtitan.experiments.tst.resilience.checkpoint.inventory import find_checkpoint
from torchtitan.experiments.tst.results.export import export, read_job
from torchtitan.experiments.tst.results.harness import TaskResult, scores_of
from torchtitan.experiments.tst.results.scores import METRICS, Score
from torchtitan.experiments.tst.results.transformers_config import ExportError

ON = superposition(steps=1)
SAVE = (
    "--training.steps=2",
    "--optimizer.lr=0.01",
    "--lr_scheduler.warmup_steps=0",
    *saving(1),
)
KINDS = {
    "llama3": ("demo", "LlamaForCausalLM"),
    "qwen3": ("debugmodel_tiny", "Qwen3ForCausalLM"),
    "qwen3 mixture of experts": ("debugmodel_moe_tiny", "Qwen3MoeForCausalLM"),
}


def of_kind(kind):
    model = (f"--model.name={kind.split()[0]}", f"--model.flavor={KINDS[kind][0]}", *SAVE)
    return (*model, "--load_balance.method=auxiliary_loss") if "experts" in kind else model


def export_run(run, output, *job_args):
    checkpoint = find_checkpoint(run)
    export(checkpoint, output, read_job(checkpoint, list(job_args)))
    return checkpoint


@torch.no_grad()
def our_logits(checkpoint, inputs):
    """Of upstream's own model with the checkpoint's weights."""
    config = read_job(checkpoint, [])
    spec = train_spec_module.get_train_spec(config.model.name)
    args = copy.deepcopy(spec.model_args[config.model.flavor])
    args.update_from_config(config)
    model = spec.model_cls(args)
    model.init_weights()
    saved = load_full(checkpoint)
    model.load_state_dict({key: saved[key] for key in model.state_dict()})
    return model(inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_transformers_are_ours(train, tmp_path, kind):
    train(*ON, *of_kind(kind))
    inputs = torch.randint(1024, (2, 32), generator=torch.Generator().manual_seed(0))
    for which in ("boundary", "step-2"):
        checkpoint, output = tmp_path / "run" / "checkpoint" / which, tmp_path / which
        export_run(checkpoint, output)
        model = AutoModelForCausalLM.from_pretrained(output)
        assert type(model).__name__ == KINDS[kind][1]
        with torch.no_grad():
            logits = model(inputs).logits
        expected = our_logits(checkpoint.resolve(), inputs)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        (text,) = model.generate(inputs[:1, :4], max_new_tokens=5, do_sample=False, pad_token_id=1)
        assert 5 <= len(text) <= 9
        assert text[4] == logits[0, 3].argmax()


def test_rope_is_scaled_as_upstreams(run, tmp_path):
    """At a few positions it changes hardly a logit: the frequencies themselves."""
    checkpoint = export_run(run, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    config = read_job(checkpoint, [])
    spec = train_spec_module.get_train_spec("llama3")
    args = copy.deepcopy(spec.model_args["demo"])
    args.update_from_config(config)
    upstream = spec.model_cls(args)._precompute_freqs_cis()[1].angle()  # of one position
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, upstream, rtol=1e-4, atol=0)
    unscaled = args.rope_theta ** (-torch.arange(0, 16, 2) / 16)
    assert unscaled[-1] / upstream[-1] > 2, "so small a model has a frequency that is scaled"


def test_tied_weights(train, tmp_path):
    train("--model.name=qwen3", "--model.flavor=tiny_tied", *SAVE, "--training.steps=1")
    checkpoint = export_run(tmp_path / "run", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    inputs = torch.randint(1024, (1, 16))
    with torch.no_grad():
        torch.testing.assert_close(
            model(inputs).logits, our_logits(checkpoint, inputs), atol=1e-4, rtol=1e-4
        )


def test_folders_and_links(train, tmp_path):
    """Checkpoints in another folder, which is a link to another disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "ckpt").symlink_to(disk)
    train(*ON, *SAVE, "--checkpoint.folder=ckpt")
    for path, step in ((run, 2), (run / "ckpt", 2), (run / "ckpt" / "boundary", 1)):
        checkpoint = find_checkpoint(path)
        assert checkpoint == run / "ckpt" / f"step-{step}"
        assert read_job(checkpoint, []).checkpoint.folder == "ckpt"


def test_a_run_in_two_phases_exports_as_its_baseline_does(finished, tmp_path):
    weights = {}
    for name, args in (("tst", ON), ("baseline", ())):
        output = tmp_path / name / "hf"
        export_run(finished(*args, *SAVE).folder, output)
        tensors = load_file(output / "model.safetensors")
        weights[name] = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
    assert weights["tst"] == weights["baseline"]
    files = [sorted(path.name for path in (tmp_path / n / "hf").iterdir()) for n in weights]
    assert files[0] == files[1]
    configs = [(tmp_path / n / "hf" / "config.json").read_text() for n in weights]
    assert configs[0] == configs[1]


@pytest.fixture
def run(finished):
    """The folder of a run, to be left as it is."""
    return finished(*SAVE).folder


def test_tokenizer_and_type(run, tmp_path, corpus):
    output = tmp_path / "hf"
    export_run(run, output, "--checkpoint.export_dtype=bfloat16")
    config = json.loads((output / "config.json").read_text())
    assert config["max_position_embeddings"] == 32, "the sequence length of training"
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(output)
    ours = HuggingFaceTokenizer(str(corpus / "tokenizer"))
    text = "def main():\n    return  'naïve' # 你好"
    assert tokenizer(text).input_ids == ours.encode(text, add_bos=False, add_eos=False)
    for written in (tokenizer, model.config, model.generation_config):
        assert (written.bos_token_id, written.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def with_special_tokens(corpus, folder, **tokens):
    """A copy of the corpus's tokenizer with other special tokens."""
    folder = shutil.copytree(corpus / "tokenizer", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def test_bos_that_is_eos(run, tmp_path, corpus):
    """As in GPT-2's tokenizer: transformers knows where a text ends."""
    end = "<|end_of_text|>"
    assets = with_special_tokens(corpus, tmp_path / "assets", bos_token=end, eos_token=end)
    export_run(run, tmp_path / "hf", f"--model.hf_assets_path={assets}")
    for name in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "hf" / name).read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, 1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 1)


def test_command_and_bad_input(run, tmp_path, tst):
    run = shutil.copytree(run, tmp_path / "run", symlinks=True)
    output, checkpoints = tmp_path / "hf", run / "checkpoint"

    def refuses(message, *args):
        result = tst("export", *args)
        assert result.code == 2
        assert message in result.stderr

    refuses("nowhere does not exist. Give a checkpoint", tmp_path / "nowhere", output)
    refuses("has another model than the config", run, output, "--model.flavor=demo_small")
    refuses("model.name = 'llama4': must be llama3 or qwen3", run, output, "--model.name=llama4")
    refuses("model.flavor = 'none': must be a flavor of llama3", run, output, "--model.flavor=none")
    refuses("model.hf_assets_path", run, output, f"--model.hf_assets_path={tmp_path}")
    assert not output.exists()

    result = tst("export", checkpoints / "step-1", output)
    assert result.code == 0, result.stderr
    before = {path: path.read_bytes() for path in output.iterdir()}
    assert len(before) == 5
    refuses("already exists", run, output)
    assert {path: path.read_bytes() for path in output.iterdir()} == before

    other = tmp_path / "other"
    (run / "config.toml").rename(run / "job.toml")  # as with upstream's trainer
    refuses("Give the job with --job.config_file", run, other)
    job = f"--job.config_file={run / 'job.toml'}"
    (shard,) = (checkpoints / "step-2").glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refuses("its checksum does not match", run, other, job)
    assert not list(tmp_path.glob("other*"))
    (checkpoints / "step-2" / "manifest.json").unlink()
    assert tst("export", checkpoints, other, job).code == 0


def test_what_transformers_has_no_place_for_is_not_left_out_unsaid(train, tmp_path, monkeypatch):
    train(*of_kind("qwen3 mixture of experts"), "--load_balance.method=bias")
    with pytest.raises(ExportError, match=r"layers.0.moe.expert_bias has no place.*auxiliary_loss"):
        export_run(tmp_path / "run", tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))
    qwen3_args = train_spec_module.get_train_spec("qwen3").model_args
    moe = dataclasses.replace(qwen3_args["debugmodel_moe_tiny"].moe_args, score_func="sigmoid")
    other = dataclasses.replace(qwen3_args["debugmodel_moe_tiny"], moe_args=moe)
    monkeypatch.setitem(qwen3_args, "other", other)
    with pytest.raises(ExportError, match=r"moe_args.score_func = 'sigmoid': must be 'softmax'"):
        export_run(tmp_path / "run", tmp_path / "hf", "--model.flavor=other")


def test_sample(run, tst, tmp_path, caplog):
    result = tst("sample", run, "--prompt", "def ", "--samples", 2, "--tokens", 8)
    assert result.code == 0, result.stderr
    assert result.stdout.startswith("--- 1\ndef ")
    assert result.stdout.count("\ndef ") == 2
    again = tst("sample", run, "--prompt", "def ", "--samples", 2, "--tokens", 8)
    assert again.stdout == result.stdout
    result = tst("sample", run, "--prompt", "def " * 40)
    assert result.code == 2
    assert "tokens: must have fewer than the model's sequence length, 32" in result.stderr
    assert "not checked for damage" not in caplog.text
    unchecked = shutil.copytree(run, tmp_path / "run", symlinks=True)
    (unchecked / "checkpoint" / "step-2" / "manifest.json").unlink()
    assert tst("sample", unchecked, "--tokens", 2).code == 0
    assert "has no manifest.json: it is not checked for damage" in caplog.text


def test_scores_are_length_normalised_where_the_harness_has_it():
    both = {"acc,none": 0.25, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.125}
    one = {"acc,none": 0.75, "acc_stderr,none": "N/A"}
    results = {
        "results": {"hellaswag": both, "own": both, "boolq": one, "mmlu": both},
        "group_subtasks": {"mmlu": ["mmlu_law", "mmlu_physics"]},
        "n-samples": {
            task: {"effective": 10}
            for task in ("hellaswag", "own", "boolq", "mmlu_law", "mmlu_physics")
        },
    }
    scores = {
        "hellaswag": TaskResult("acc_norm", Score(50.0, 12.5), 10),
        "own": TaskResult("acc_norm", Score(50.0, 12.5), 10),
        "boolq": TaskResult("acc", Score(75.0, None), 10),
        "mmlu": TaskResult("acc", Score(25.0, None), 20),
    }
    assert scores_of(results, list(scores)) == scores
    assert scores_of(results, ["boolq"]) == {"boolq": scores["boolq"]}
    assert set(METRICS) == set(paper.runs()["3B-20k-tst"].scores)


@pytest.mark.slow
def test_the_harness_knows_the_papers_tasks():
    assert set(TaskManager().all_tasks) >= set(METRICS)


def test_harness_offline(run, tmp_path, tst, offline_harness):
    output, tasks = tmp_path / "hf", tmp_path / "tasks"
    export_run(run, output)
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    # four questions, of which three have the likeliest next token for their answer
    question = tokenizer("def").input_ids
    inputs = torch.tensor([[tokenizer.bos_token_id, *question]])
    order = model(inputs).logits[0, -1].argsort(descending=True).tolist()
    words = [
        word
        for token in order
        if tokenizer("def" + (word := tokenizer.decode(token))).input_ids == [*question, token]
    ]
    choices = [words[0], words[-1]]
    question = {"question": "def", "choices": choices}
    write_task(tasks, "endings", [question | {"answer": answer} for answer in (0, 0, 0, 1)])
    args = ("--tasks", "endings", "--include-path", tasks, "--batch-size", 4)
    result = tst("evaluate", output, *args)
    assert result.code == 0, result.stderr
    assert "paper: 270M-20k-tst" in result.stdout
    assert "endings: 75.0" in result.stdout
    written = json.loads((output / "evaluation.json").read_text())
    assert written["scores (%)"] == {"endings": 75.0}
    assert written["paper (%)"]["270M-20k-tst"]["piqa"] == 67.0
    assert written["harness"]["n-shot"] == {"endings": 0}

    result = tst("evaluate", output, *args)
    assert "evaluation.json already exists. Give another file with --output" in result.stderr
    (output / "evaluation.json").unlink()
    result = tst("evaluate", output, "--tasks", "endings,arc_easey")
    assert result.code == 2
    assert "--tasks endings,arc_easey: unknown to the harness" in result.stderr
    result = tst("evaluate", output, *args, "--training.seq_len=64")
    assert "exported already: remove --training.seq_len=64" in result.stderr


def test_a_tokenizer_without_bos_and_eos(run, tmp_path, tst, offline_harness, corpus):
    output, tasks = tmp_path / "hf", tmp_path / "tasks"
    assets = with_special_tokens(corpus, tmp_path / "assets")
    export_run(run, output, f"--model.hf_assets_path={assets}")
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    line_break = torch.tensor([tokenizer("\n").input_ids])
    likeliest = tokenizer.decode(model(line_break).logits[0, -1].argmax())
    question = {"question": "", "choices": ["~", likeliest], "answer": 1}
    write_task(tasks, "endings", [question])
    write_task(tasks, "texts", [question], kind="generate_until", rest=TEXT)
    args = ("--include-path", tasks, "--batch-size", 1, "--tasks")
    result = tst("evaluate", output, *args, "endings")
    assert result.code == 0, result.stderr
    assert "endings: 100.0" in result.stdout, "a line break is the context of a text without"
    result = tst("evaluate", output, *args, "texts", "--output", tmp_path / "other")
    assert result.code == 2
    assert "error: --tasks: one of the tasks generates text up to the EOS token" in result.stderr

    result = tst("sample", output, "--prompt", "def ", "--tokens", 4)
    assert result.code == 0, result.stderr
    result = tst("sample", output)
    assert "error: --prompt is empty, and this tokenizer has no BOS token" in result.stderr

    (output / "tokenizer.json").write_text("{")
    (output / "evaluation.json").unlink()
    for command, more in (("sample", ()), ("evaluate", (*args, "endings"))):
        result = tst(command, output, *more)
        assert f"error: {output}: tokenizer.json is not JSON" in result.stderr
