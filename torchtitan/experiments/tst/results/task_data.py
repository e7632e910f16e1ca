"""Read the data of the harness's tasks from a folder instead of the Hugging Face hub.

The folder has the dataset repositories of the hub, each in FOLDER/OWNER/NAME.
"""

import os
import pkgutil
import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants

from ..errors import ArgumentError, UserError, in_one_line
from ..upstream.replaced import replaced

# Readers of files that come with datasets. A dataset path may also be one of them, such as "json".
_READERS = {module.name for module in pkgutil.iter_modules(datasets.packaged_modules.__path__)}


def repositories(tasks: list[str], index: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the dataset repositories of tasks, and for each the tasks that read it.

    Args:
        tasks: names of tasks, groups or tags.
        index: the harness's entry of each name.
    """
    found: dict[str, list[str]] = {}
    for task in tasks:
        for path in dict.fromkeys(_dataset_paths(task, index)):
            if _is_repository(path):
                found.setdefault(path, []).append(task)
    return found


def _dataset_paths(
    member: str | dict[str, Any], index: Mapping[str, Any], inherited: str | None = None
) -> Iterator[str]:
    """Yield the dataset path of each task in a member of a group.

    Args:
        member: name of a task, a group or a tag, or a dictionary with that name and settings.
        index: the harness's entry of each name.
        inherited: dataset path that the group sets for its members.
    """
    settings = {"task": member} if isinstance(member, str) else member
    entry = index.get(settings.get("group") or settings["task"])
    # a tag has no config, and a member that is not in the index is defined by its settings
    config = (entry.cfg or {"task": sorted(entry.tags)}) if entry else settings
    path = settings.get("dataset_path") or inherited or config.get("dataset_path")
    if isinstance(config.get("task"), list):
        for part in config["task"]:
            yield from _dataset_paths(part, index, path)
    elif path:
        yield path


def _is_repository(path: str) -> bool:
    return path not in _READERS and not Path(path).is_absolute()


def download_command(repository: str, folder: Path) -> str:
    """Return the shell command that downloads a dataset repository to its place in the folder."""
    target = os.fspath(folder / repository)
    return shlex.join(
        ["hf", "download", repository, "--repo-type", "dataset", "--local-dir", target]
    )


def check_folder(folder: Path, needed: Mapping[str, list[str]]) -> None:
    """Check that the folder has the dataset repositories.

    Args:
        folder: the folder.
        needed: the tasks that read each repository, as from :func:`repositories`.

    Raises:
        ArgumentError: for repositories that are missing. A relative path of a folder that exists,
            which datasets also accepts, is none.
    """
    commands = [
        f"{download_command(repository, folder)}  # {', '.join(tasks)}"
        for repository, tasks in needed.items()
        if not any(place.is_dir() for place in (folder / repository, Path(repository)))
    ]
    if commands:
        listed = "".join(f"\n  {command}" for command in commands)
        raise ArgumentError(
            f"--task-data {folder}: the folder lacks the data of some tasks. On a machine with a "
            f"network, run:{listed}"
        )


@contextmanager
def offline() -> Iterator[None]:
    """Make every request to the Hugging Face hub an error in this context."""
    with ExitStack() as stack:
        for module in (datasets.config, huggingface_hub.constants):
            stack.enter_context(replaced(module, "HF_HUB_OFFLINE", True))
        yield


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Let datasets show none in this context: MMLU alone has three for each of 57 datasets."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def read_from(folder: Path, cache: Path, task: str) -> Iterator[None]:
    """Read the datasets of a task from a folder in this context, and nothing from the hub.

    It replaces the function of datasets that finds a dataset. So it covers every kind of task, and
    other paths stay relative to the working directory.

    Args:
        folder: the folder.
        cache: a temporary folder for the data in the format that tasks read. The usual cache would
            return old data after a second download: its key for a local folder is the dataset card.
        task: name of the task, for errors.

    Raises:
        ArgumentError: for data that is missing, or that the task cannot use.
    """
    load = datasets.load.load_dataset_builder
    last = ""  # the dataset that was read last

    def load_from_folder(path: str, name: str | None = None, **options: Any) -> Any:
        nonlocal last
        last = ""
        if _is_repository(path):
            check_folder(folder, {path: [task]})
            if (found := folder / path).is_dir():
                last = f"{found}{f' ({name})' if name else ''}"
                # two repositories may have the same name and dataset card
                options["cache_dir"] = os.fspath(cache / path)
                path = os.fspath(found)
        return load(path, name, **options)

    replacement = replaced(datasets.load, "load_dataset_builder", load_from_folder)
    with offline(), _without_progress_bars(), replacement:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # other data may fail anywhere in the task
            if not last:
                raise
            reason = in_one_line(error.__cause__ or error).rstrip(".")
            raise ArgumentError(
                f"--task-data: the task {task} cannot use the data in {last}: {reason}. Download "
                "all files of this dataset repository again"
            ) from error
