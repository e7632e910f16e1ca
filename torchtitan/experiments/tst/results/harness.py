"""Run the LM-Eval harness, 0-shot, on exported models."""

import atexit
import functools
import logging
import math
import shutil
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
import torch
import transformers
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.utils import collect_env
from typing_extensions import override

from ..data.tokenizer import open_tokenizer
from ..errors import ArgumentError
from ..upstream.replaced import replaced
from . import task_data
from .scores import METRICS, Score


@dataclass(frozen=True)
class Harness:
    """The harness with its settings.

    Attributes:
        tasks: names of tasks that the harness knows.
        include_path: a folder with YAML files of further tasks.
        batch_size: number of sequences, or "auto".
        limit: number of documents of each task; None for all.
        device: torch's name of the device; None for the accelerator, or the CPU without one.
        task_data: a folder with the dataset repositories of the tasks, each in its own folder
            OWNER/NAME; None to read them from the Hugging Face hub.
    """

    tasks: list[str]
    include_path: Path | None = None
    batch_size: str = "auto"
    limit: int | None = None
    device: str | None = None
    task_data: Path | None = None

    def check(self) -> None:
        """Check that the harness knows the tasks, and load their data.

        Raises:
            ArgumentError: for tasks that it does not know, or that cannot be read, and for data
                that the folder lacks, or that is damaged.
            OSError: if the hub cannot be reached.
        """
        known = set(self._manager.all_tasks)
        if unknown := [task for task in self.tasks if task not in known]:
            raise ArgumentError(
                f"--tasks {','.join(unknown)}: unknown to the harness. `lm_eval ls tasks` lists "
                "its tasks; --include-path FOLDER adds your own"
            )
        if self.task_data:
            task_data.check_folder(self.task_data, self.repositories())
        for task in self.tasks:
            self._load_task(task)

    def check_accuracies(self) -> None:
        """Check that the harness has an accuracy for each task, as far as the tasks tell.

        Raises:
            ArgumentError: for a tag, which names several tasks, or a task without an accuracy.
        """
        for name in self.tasks:
            first, *others = self._load_task(name)
            if others:
                parts = ",".join(str(part.task_name) for part in (first, *others))
                raise ArgumentError(f"--tasks {name}: names several tasks. Give {parts}")
            if isinstance(first, Task) and not {"acc", "acc_norm"} & first.aggregation().keys():
                raise ArgumentError(
                    f"--tasks {name}: the harness has no accuracy for it. Choose a task with the "
                    "metric acc or acc_norm"
                )

    def repositories(self) -> dict[str, list[str]]:
        """Return the dataset repositories of the tasks, and for each the tasks that read it."""
        return task_data.repositories(self.tasks, self._manager.task_index)

    @functools.cached_property
    def _manager(self) -> TaskManager:
        path = self.include_path
        if path and not path.is_dir():
            raise ArgumentError(f"--include-path {path}: there is no such folder")
        try:
            return TaskManager(include_path=str(path) if path else None)
        except ValueError as error:  # in the YAML of a task
            raise ArgumentError(f"--include-path {path}: {error}") from error

    def load(self, folder: Path) -> HFLM:
        """Return the harness's model of an exported folder, on the device.

        Raises:
            ArgumentError: for a model that transformers does not know.
        """
        transformers.logging.set_verbosity_error()
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        with self._hub():
            return _load_model(folder, self.batch_size, self.device or str(accelerator or "cpu"))

    def run(self, model: HFLM, tasks: list[str]) -> dict[str, Any]:
        """Return the harness's own results of a model on tasks.

        Raises:
            ArgumentError: for tasks that this model cannot do.
        """
        once = replaced(collect_env, "get_pretty_env_info", _environment)
        with self._hub(), once:
            return lm_eval.simple_evaluate(
                model=model,
                tasks=[part for task in tasks for part in self._load_task(task)],
                num_fewshot=0,
                batch_size=self.batch_size,
                limit=self.limit,
                device=str(model.device),
                task_manager=self._manager,
                log_samples=False,
            )

    def _hub(self) -> AbstractContextManager[None]:
        """Return a context without the hub if the data is in a folder."""
        return task_data.offline() if self.task_data else nullcontext()

    def _data_of(self, task: str) -> AbstractContextManager[None]:
        if not self.task_data:
            return nullcontext()
        return task_data.read_from(self.task_data, self._cache, task)

    @functools.cached_property
    def _cache(self) -> Path:
        """A temporary folder, which loaded tasks read until the end of the process."""
        folder = tempfile.mkdtemp(prefix="task-data-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    @functools.cached_property
    def _loaded(self) -> dict[str, list[Task | Group]]:
        return {}

    def _load_task(self, task: str) -> list[Task | Group]:
        """Return a task or a group with its data, or all tasks of a tag; each is loaded once."""
        if task not in self._loaded:
            with self._data_of(task):
                found = self._manager.load([task])
            group = found["groups"].get(task)
            self._loaded[task] = [group] if group else list(found["tasks"].values())
        return self._loaded[task]


# The harness describes the environment in each result; this runs pip and takes seconds.
_environment = functools.cache(collect_env.get_pretty_env_info)


class _Model(HFLM):
    """The harness's model, which also accepts a tokenizer without EOS."""

    @override
    def generate_until(self, *args: Any, **kwargs: Any) -> list[str]:
        if self.tokenizer.eos_token_id is None:
            raise ArgumentError(
                "--tasks: one of the tasks generates text up to the EOS token, and the model's "
                "tokenizer has none. Choose multiple-choice tasks"
            )
        return super().generate_until(*args, **kwargs)


def _load_model(folder: Path, batch_size: str, device: str) -> _Model:
    """Return the harness's model, also for a tokenizer without BOS or EOS.

    The harness assumes that there is an EOS token: as the end of generated text, and, without BOS,
    as the context of a text without context.
    """
    tokenizer = open_tokenizer(folder)
    options = {}
    if tokenizer.bos_id is None and tokenizer.eos_id is None:
        line_break = tokenizer.tokenizer.encode("\n", add_special_tokens=False).ids
        options["prefix_token_id"] = (line_break or [0])[-1]
        logging.warning(
            "The tokenizer has neither BOS nor EOS: texts without context get a line break as "
            "context"
        )
    try:
        return _Model(
            pretrained=str(folder),
            add_bos_token=tokenizer.bos_id is not None,  # in training, documents begin with BOS
            batch_size=batch_size,
            device=device,
            **options,
        )
    except ValueError as error:  # for example a model that transformers does not know
        raise ArgumentError(f"{folder}: {error}") from error


class TaskResult(NamedTuple):
    """The score on a task.

    Attributes:
        metric: the harness's name of the metric.
        score: score and standard error, percent.
        documents: number of documents that were scored.
    """

    metric: str
    score: Score
    documents: int


def scores_of(results: dict[str, Any], tasks: list[str]) -> dict[str, TaskResult]:
    """Return the score of each task, but not those of its parts, such as MMLU's 57.

    A task without an accuracy is missing.

    Args:
        results: the harness's own results.
        tasks: names of the tasks.
    """
    scores = {}
    for task in tasks:
        values = results["results"].get(task, {})
        names = [METRICS[task]] if task in METRICS else ["acc_norm", "acc"]
        for name in names:
            if f"{name},none" in values and task not in scores:
                error = values.get(f"{name}_stderr,none")
                has_error = isinstance(error, float) and math.isfinite(error)  # else "N/A"
                score = Score(100 * values[f"{name},none"], 100 * error if has_error else None)
                scores[task] = TaskResult(name, score, _documents(results, task))
    return scores


def _documents(results: dict[str, Any], task: str) -> int:
    """Return the number of documents of a task, or of all tasks of a group."""
    parts = results.get("group_subtasks", {}).get(task)
    if parts:
        return sum(_documents(results, part) for part in parts)
    return results["n-samples"][task]["effective"]
