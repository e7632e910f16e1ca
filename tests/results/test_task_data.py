"""Tasks of the LM-Eval harness read their data from a folder, without the Hugging Face hub."""

import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub.constants
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import ROOT, saving
from task_repositories import (
    BOOLQ,
    HELLASWAG,
    INSTALLED,
    LAMBADA,
    MMLU,
    WINOGRANDE,
    choices,
    take_task,
    write_papers_data,
    write_repository,
)
from tasks import write_task
from torchtitan.experiments.tst.errors import ArgumentError
from torchtitan.experiments.tst.resilience.checkpoint.inventory import find_checkpoint
from torchtitan.experiments.tst.results.export import export, read_job
from torchtitan.experiments.tst.results.harness import Harness, scores_of
from torchtitan.experiments.tst.results.scores import METRICS
from torchtitan.experiments.tst.results.task_data import read_from, repositories

OF_THE_HUB = (datasets.config, huggingface_hub.constants)


@pytest.fixture
def model(finished, tmp_path):
    """An exported folder of a small model."""
    args = ("--training.steps=2", "--optimizer.lr=0.01", "--lr_scheduler.warmup_steps=0")
    checkpoint = find_checkpoint(finished(*args, *saving(1)).folder)
    export(checkpoint, tmp_path / "hf", read_job(checkpoint, []))
    return tmp_path / "hf"


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A machine without a network, which is not told so; and a cache of its own for datasets."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"asks {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for module in OF_THE_HUB:
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)


def accuracies(model, harness):
    harness.check()
    results = harness.run(harness.load(model), harness.tasks)
    of_tasks = scores_of(results, harness.tasks)
    return results, {
        task: (score.value, documents) for task, (_, score, documents) in of_tasks.items()
    }


@pytest.mark.slow
def test_the_papers_tasks(model, no_network, tmp_path):
    folder = tmp_path / "data"
    write_papers_data(folder)
    harness = Harness(list(METRICS), task_data=folder, batch_size="64")
    _, found = accuracies(model, harness)
    # each question is there once for each of its answers
    of_two = dict.fromkeys(("boolq", "piqa", "winogrande"), (50.0, 2))
    expected = dict.fromkeys(METRICS, (25.0, 4)) | of_two | {"mmlu": (25.0, 57 * 4)}
    assert found == expected


def test_tasks_of_every_form(model, no_network, offline_harness, tmp_path, monkeypatch):
    """Multiple choice, completion, log-likelihood; a group; a task with a file of its own."""
    folder, tasks = tmp_path / "data", tmp_path / "tasks"
    write_repository(folder, "allenai/ai2_arc", {"ARC-Easy": choices("question")})
    write_repository(folder, "Rowan/hellaswag", {"default": HELLASWAG}, kind="jsonl")
    write_repository(folder, "allenai/winogrande", {"winogrande_xl": WINOGRANDE})
    write_repository(folder, "aps/super_glue", {"boolq": BOOLQ}, kind="jsonl")
    write_repository(folder, "EleutherAI/lambada_openai", {"default": LAMBADA}, kind="jsonl")
    write_repository(folder, "cais/mmlu", {"anatomy": MMLU, "law": MMLU[:2]}, ("test", "dev"))
    take_task(tasks, "arc/arc_easy.yaml")
    take_task(tasks, "hellaswag/hellaswag.yaml")
    take_task(tasks, "winogrande/default.yaml")
    take_task(tasks, "super_glue/boolq/default.yaml")
    take_task(tasks, "lambada/lambada_openai.yaml")
    take_task(tasks, "mmlu/default/mmlu_anatomy.yaml")
    take_task(tasks, "mmlu/default/mmlu_anatomy.yaml", task="law", dataset_name="law", tag="legal")
    group = {"group": "subjects", "task": ["mmlu_anatomy", "legal"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (tasks / "subjects.yaml").write_text(yaml.safe_dump(group))
    monkeypatch.chdir(tmp_path)
    question = {"question": "def", "choices": ["a", "b"]}
    write_task(Path("tasks"), "own", [question | {"answer": answer} for answer in (0, 1)])

    before = sorted(folder.rglob("*"))
    names = ["arc_easy", "hellaswag", "winogrande", "boolq", "lambada_openai", "subjects", "own"]
    harness = Harness(names, include_path=tasks, task_data=folder, batch_size="8")
    results, found = accuracies(model, harness)
    assert found.pop("lambada_openai") in ((0.0, 1), (100.0, 1))
    assert found == {
        "arc_easy": (25.0, 4),
        "hellaswag": (25.0, 4),
        "winogrande": (50.0, 2),
        "boolq": (50.0, 2),
        "subjects": (results["results"]["subjects"]["acc,none"] * 100, 6),
        "own": (50.0, 2),
    }
    assert results["results"]["mmlu_anatomy"]["acc,none"] == 0.25
    perplexity = results["results"]["lambada_openai"]["perplexity,none"]
    assert perplexity == pytest.approx(perplexity_of_last_word(model, LAMBADA[0]["text"]), rel=1e-3)
    assert sorted(folder.rglob("*")) == before, "the folder may be read-only"

    again = harness.run(harness.load(model), ["subjects", "boolq"])
    for task in ("subjects", "boolq"):
        assert again["results"][task] == results["results"][task], "each task is loaded once"


def perplexity_of_last_word(model, text):
    tokenizer = AutoTokenizer.from_pretrained(model)
    context, _, word = text.rpartition(" ")
    tokens = [tokenizer.bos_token_id, *tokenizer(f"{context} {word}").input_ids]
    first = 1 + len(tokenizer(context).input_ids)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([tokens])).logits[0]
    of_word = torch.nn.functional.cross_entropy(
        logits[first - 1 : -1], torch.tensor(tokens[first:]), reduction="sum"
    )
    return of_word.exp().item()


@pytest.fixture
def boolq(tmp_path, offline_harness, no_network):
    """The repository of BoolQ in a folder, the task, and the error of its check."""

    def error():
        with pytest.raises(ArgumentError) as found:
            harness().check()
        return str(found.value)

    def harness():
        return Harness(["boolq"], include_path=tmp_path / "tasks", task_data=tmp_path / "data")

    take_task(tmp_path / "tasks", "super_glue/boolq/default.yaml")
    repository = write_repository(tmp_path / "data", "aps/super_glue", {"boolq": BOOLQ})
    return SimpleNamespace(repository=repository, harness=harness, error=error)


def without_card(repository):
    (repository / "README.md").unlink()
    return "BuilderConfig 'boolq' not found"


def damaged(repository):
    (repository / "boolq/validation-00000-of-00001.parquet").write_bytes(b"PAR1")
    return "ArrowInvalid"


def without_data(repository):
    shutil.rmtree(repository / "boolq")
    return "DataFilesNotFoundError"


def interrupted(repository):
    for path in (repository / "boolq", repository / "README.md"):
        path.rename(repository / ".cache" / path.name)
    return "EmptyDatasetError"


def other_columns(repository):
    shutil.rmtree(repository)
    write_repository(repository.parents[1], "aps/super_glue", {"boolq": WINOGRANDE})
    return "UndefinedError: 'passage' is undefined"


def other_splits(repository):
    shutil.rmtree(repository)
    write_repository(repository.parents[1], "aps/super_glue", {"boolq": BOOLQ}, ["train"])
    return "KeyError: 'validation'"


@pytest.mark.parametrize(
    "change", [without_card, damaged, without_data, interrupted, other_columns, other_splits]
)
def test_data_that_cannot_be_used(boolq, change):
    reason = change(boolq.repository)
    error = boolq.error()
    start = f"--task-data: the task boolq cannot use the data in {boolq.repository} (boolq): "
    assert error.startswith(start)
    assert reason in error
    assert "\n" not in error


def test_a_second_download_is_read(boolq):
    """The cache of datasets takes data with the same README.md for the same."""
    counts = []
    for rows in (BOOLQ, BOOLQ * 2):
        shutil.rmtree(boolq.repository)
        write_repository(boolq.repository.parents[1], "aps/super_glue", {"boolq": rows})
        harness = boolq.harness()
        harness.check()
        counts += [len(task.eval_docs) for task in harness._load_task("boolq")]
    assert counts == [2, 4]


def test_repositories_of_one_name(no_network, tmp_path):
    """Their dataset cards may be the same, too."""
    data, cache = tmp_path / "data", tmp_path / "prepared"
    write_repository(data, "one/copy", {"boolq": BOOLQ})
    write_repository(data, "other/copy", {"boolq": BOOLQ * 2})
    with read_from(data, cache, "task"):
        found = [datasets.load_dataset(name, "boolq") for name in ("one/copy", "other/copy")]
        assert all(module.HF_HUB_OFFLINE for module in OF_THE_HUB)
    assert [len(dataset["test"]) for dataset in found] == [2, 4]
    assert not any(module.HF_HUB_OFFLINE for module in OF_THE_HUB)


def test_missing_data(tst, offline_harness, tmp_path):
    folder, tasks = tmp_path / "my data", tmp_path / "tasks"
    write_repository(folder, "allenai/ai2_arc", {"ARC-Easy": choices("question")})
    for path in ("arc/arc_easy", "piqa/piqa", "winogrande/default"):
        take_task(tasks, f"{path}.yaml")
    take_task(tasks, "piqa/piqa.yaml", task="piqa_2")
    (tmp_path / "config.json").write_text("{}")  # the data is missing before the model is loaded
    args = ("--include-path", tasks, "--tasks", "arc_easy,piqa,piqa_2,winogrande")
    result = tst("evaluate", tmp_path, *args, "--task-data", folder)
    assert result.code == 2
    assert f"error: --task-data {folder}: the folder lacks the data of some tasks" in result.stderr
    lines = [line.strip() for line in result.stderr.splitlines() if "hf download" in line]
    command = "hf download {0} --repo-type dataset --local-dir '{1}/{0}'  # {2}"
    assert lines == [
        command.format("baber/piqa", folder, "piqa, piqa_2"),
        command.format("allenai/winogrande", folder, "winogrande"),
    ]


def test_repositories(tmp_path):
    def write(**config):
        (tmp_path / f"{len([*tmp_path.iterdir()])}.yaml").write_text(yaml.safe_dump(config))

    write(task="one", dataset_path="owner/one", tag="some")
    write(task="two", dataset_path="two", tag=["some", "others"])  # without an owner, as "anli"
    write(task="file", dataset_path="json", dataset_kwargs={"data_files": "file.jsonl"})
    write(task="place", dataset_path=str(tmp_path / "place"))
    write(task="function", custom_dataset="make")
    write(group="all", task=["one", "some", "file", {"task": "two", "dataset_path": "owner/two"}])
    inline = {"group": "inline", "task": ["one", {"task": "new", "dataset_path": "owner/new"}]}
    write(group="nested", task=["all", inline, {"group": "all", "dataset_path": "owner/all"}])
    write(group="moved", dataset_path="owner/moved", task=["one", "two"])
    index = TaskManager(include_path=str(tmp_path), include_defaults=False).task_index

    def read_by(*names):
        return repositories(list(names), index)

    assert read_by("one", "two", "some", "others") == {
        "owner/one": ["one", "some"],
        "two": ["two", "some", "others"],
    }
    assert read_by("file", "place", "function") == {}
    assert list(read_by("all")) == ["owner/one", "two", "owner/two"]
    assert list(read_by("nested")) == ["owner/one", "two", "owner/two", "owner/new", "owner/all"]
    assert read_by("moved") == {"owner/moved": ["moved"]}


def test_a_task_that_is_not_in_yaml(tmp_path):
    """Tasks in Python name their dataset only when they load it."""
    with (
        pytest.raises(ArgumentError, match=r"hf download owner/name .* # task"),
        read_from(tmp_path / "data", tmp_path / "cache", "task"),
    ):
        datasets.load_dataset("owner/name")
    with pytest.raises(OSError, match="no_such_file"), read_from(tmp_path, tmp_path, "task"):
        datasets.load_dataset("json", data_files="no_such_file")


def test_the_docs_list_the_papers_repositories():
    """The page's loop downloads what the installed harness reads."""
    folders = ("hellaswag", "arc", "mmlu/default", "super_glue/boolq", "openbookqa", "piqa")
    paths = [str(INSTALLED / folder) for folder in (*folders, "winogrande")]
    index = TaskManager(include_path=paths, include_defaults=False).task_index
    page = (ROOT / "docs/evaluation.md").read_text().replace("\\\n", " ")
    (loop,) = re.findall(r"^for repository in (.+); do$", page, re.MULTILINE)
    assert sorted(loop.split()) == sorted(repositories(list(METRICS), index))
    for repository, tasks in repositories(list(METRICS), index).items():
        listed = ", ".join(f"`{task}`" for task in tasks)
        assert re.search(rf"^\| {listed} \| `{repository}` \|", page, re.MULTILINE), repository
