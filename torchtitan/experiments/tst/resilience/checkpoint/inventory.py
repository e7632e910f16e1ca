"""Identify the folders of a run. Everything that reads a checkpoint uses this module.

In the run's checkpoint folder (``checkpoint.folder``):

- ``step-N``: a complete checkpoint. It gets this name only when everything in it is on disk.
- ``boundary``: a link to the checkpoint of the last superposition step, which is never deleted.
- ``saving-N``: a save that is running or was cut short.
- ``deleting-N``: a deletion that is running or was cut short.
- ``damaged-N``: a damaged checkpoint that ``resilience.skip_damaged`` has renamed.
- ``replaced-N``: the former ``step-N`` after step N was saved again: a finished model, a damaged
  checkpoint, or a folder of unknown content.
- ``reading-N-*``: hard links to the files of ``step-N``, while a program reads them.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torchtitan.components.checkpoint import DATALOADER, LR_SCHEDULER, OPTIMIZER, TRAIN_STATE
from torchtitan.tools.logging import logger

from ...file_checks import what_is_wrong
from ...upstream.names import SHARDED_DIR_NAME, WEIGHTS_INDEX
from ..run_folder import read_config
from .manifests import METADATA, CheckpointError, read_manifest
from .reader import read_metadata

BOUNDARY = "boundary"
_ALL_BUT_THE_MODEL = {DATALOADER, LR_SCHEDULER, OPTIMIZER, TRAIN_STATE}


class Kind(Enum):
    """The kind of a folder; its value completes the sentence "it is ..."."""

    FULL = "a full checkpoint"
    MODEL = "a checkpoint of the model only"
    HUGGING_FACE = "a model in Hugging Face format"
    DAMAGED = "a damaged checkpoint"
    INCOMPLETE = "an incomplete checkpoint"
    FOREIGN = "no checkpoint"

    @property
    def is_model(self) -> bool:
        """Whether a run can end with it but cannot resume from it."""
        return self in (Kind.MODEL, Kind.HUGGING_FACE)


@dataclass(frozen=True)
class Checkpoint:
    """A folder ``step-N`` of a run."""

    path: Path
    step: int

    @functools.cached_property
    def kind(self) -> Kind:
        """Its kind, read on first use: without a manifest, that reads all of DCP's metadata."""
        return identify(self.path)

    @property
    def resumable(self) -> bool:
        """Whether a launch resumes from it, unless it turns out to be damaged.

        A seed checkpoint, step 0, has only the model.
        """
        is_seed = self.step == 0 and self.kind is Kind.MODEL
        return is_seed or self.kind in (Kind.FULL, Kind.DAMAGED)

    def finishes(self, total_steps: int) -> bool:
        """Return whether it is the final model of a run of ``total_steps`` steps."""
        return self.step >= max(1, total_steps) and self.kind.is_model


def identify(path: Path) -> Kind:
    """Return the kind of a folder, by its files and not by its name."""
    try:
        if manifest := read_manifest(path):
            if any(not (path / name).is_file() for name in manifest["files"]):
                return Kind.DAMAGED  # it was complete once
            if METADATA not in manifest["files"]:
                return Kind.HUGGING_FACE
            return Kind.FULL if manifest["resumable"] else Kind.MODEL
        if (path / METADATA).is_file():
            keys = read_metadata(path).state_dict_metadata
            full = any(key.startswith(f"{TRAIN_STATE}.") for key in keys)
            return Kind.FULL if full else Kind.MODEL
    except (CheckpointError, NotADirectoryError):
        return Kind.DAMAGED if path.is_dir() else Kind.FOREIGN
    if any(path.glob("*.safetensors")):
        return Kind.INCOMPLETE if missing_weights(path) else Kind.HUGGING_FACE
    cut_short = (path / SHARDED_DIR_NAME).is_dir() or any(path.glob("*.distcp"))
    is_empty = path.is_dir() and not any(path.iterdir())
    return Kind.INCOMPLETE if cut_short or is_empty else Kind.FOREIGN


def missing_weights(folder: Path) -> list[str]:
    """Return the names of the files that are missing in a folder in Hugging Face format.

    A single file of weights needs no index, unless upstream was going to write one.
    """
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        parts = [re.search(r"-of-(\d+)", path.name) for path in folder.glob("*.safetensors")]
        is_part = any(part and int(part[1]) > 1 for part in parts)
        return [WEIGHTS_INDEX] if is_part or (folder / SHARDED_DIR_NAME).is_dir() else []
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{WEIGHTS_INDEX} (unreadable)"]
    return sorted(name for name in names if not (folder / name).is_file())


def check_weights(folder: Path) -> None:
    """Check that the files of a folder in Hugging Face format can be opened.

    Raises:
        CheckpointError: for a file that cannot be opened.
    """
    for path in sorted(folder.glob("*.safetensors")):
        if wrong := what_is_wrong(path):
            raise CheckpointError(f"{path} {wrong}")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from None


def check_load_step(folder: Path, step: int, not_loaded: list[str]) -> None:
    """Check that the checkpoint that ``checkpoint.load_step`` names can be loaded.

    Args:
        folder: folder of the run's checkpoints.
        step: ``checkpoint.load_step``.
        not_loaded: ``checkpoint.exclude_from_loading``.

    Raises:
        CheckpointError: if it cannot be loaded; the message says what is there instead.
    """
    found = Checkpoint(path := step_folder(folder, step), step)
    model_alone = found.kind is Kind.MODEL and set(not_loaded) >= _ALL_BUT_THE_MODEL
    if found.resumable or model_alone:
        return
    steps = [other.step for other in list_checkpoints(folder) if other.resumable]
    listed, advice = "No step can be loaded", "Check job.dump_folder and checkpoint.folder"
    if steps:
        listed = f"Steps that can be loaded: {', '.join(map(str, steps))}"
        advice = "Use one of them, or -1 for the newest"
    if found.kind.is_model:
        in_hf = " and checkpoint.initial_load_in_hf = true" * (found.kind is Kind.HUGGING_FACE)
        advice = f"To start a new run from it, set checkpoint.initial_load_path to it{in_hf}"
    raise CheckpointError(
        f"checkpoint.load_step = {step}: {path} {describe(path)}. {listed}. {advice}"
    )


def check_may_start_anew(folder: Path, checkpoints: list[Checkpoint]) -> None:
    """Check that a job that can resume from none of its checkpoints has none to lose.

    Raises:
        CheckpointError: if there is one; the message lists all of them.
    """
    kept = [found for found in checkpoints if found.kind is not Kind.INCOMPLETE]
    if kept:
        listed = "".join(f"\n  {found.path} is {found.kind.value}" for found in kept)
        raise CheckpointError(
            f"none of the checkpoints in {folder} can be resumed:{listed}\nTo train anew, choose "
            "another job.dump_folder or checkpoint.folder. To start a new run from a model, set "
            "checkpoint.initial_load_path"
        )


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the folders ``step-N`` of a run, of every kind, by ascending step."""
    return [Checkpoint(path, step) for step, path in folders_of_kind(folder, "step")]


def complete_steps(folder: Path) -> list[int]:
    """Return the steps with a complete checkpoint of any kind, ascending."""
    complete = (Kind.FULL, Kind.MODEL, Kind.HUGGING_FACE)
    return [found.step for found in list_checkpoints(folder) if found.kind in complete]


def full_steps(folder: Path) -> list[int]:
    """Return the steps with a complete checkpoint that a launch can resume from, ascending."""
    return [found.step for found in list_checkpoints(folder) if found.kind is Kind.FULL]


def known_damage(checkpoint: Checkpoint) -> str:
    """Return what is wrong with a checkpoint without reading its files; "" if nothing is."""
    return f"it {describe(checkpoint.path)}" if checkpoint.kind is Kind.DAMAGED else ""


def resume_point(
    checkpoints: Iterable[Checkpoint],
    total_steps: int,
    damage: Callable[[Checkpoint], str] = known_damage,
    skipped: Callable[[Checkpoint, str], None] = lambda checkpoint, reason: None,
) -> Checkpoint | None:
    """Return the checkpoint that a launch resumes from, or the final model of a run that has ended.

    The checks before a launch, the trainer and W&B all use this function.

    Args:
        checkpoints: checkpoints of the run, by ascending step.
        total_steps: number of steps of the run.
        damage: returns what is wrong with a checkpoint whose files are there; "" if nothing is.
        skipped: called with each newer checkpoint that cannot be resumed, and the reason.
    """
    for found in reversed(list(checkpoints)):
        if found.resumable or found.finishes(total_steps):
            reason = damage(found)
        else:
            reason = f"it {describe(found.path)}"
        if not reason:
            return found
        skipped(found, reason)
    return None


def is_kept(checkpoint: Path) -> bool:
    """Return whether a checkpoint is never deleted: that of the boundary, or of a stage."""
    with suppress(CheckpointError):
        manifest = read_manifest(checkpoint) or {"boundary": False}
        return manifest.get("kept", manifest["boundary"])  # older manifests have no "kept"
    return False


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that ``path`` names: itself, or the newest one of a run.

    Args:
        path: a checkpoint, such as RUN/checkpoint/boundary, its folder, or a run folder.

    Raises:
        CheckpointError: if there is none; the message says what is there instead.
    """
    path = path.absolute()  # not resolved: the run's config is in a folder above it
    if path.is_dir() and identify(path) is not Kind.FOREIGN:
        checkpoint = path.parent / path.readlink() if path.is_symlink() else path
    elif found := [c for c in list_checkpoints(checkpoints_of(path)) if c.kind is not Kind.FOREIGN]:
        complete = [c for c in found if c.kind is not Kind.INCOMPLETE]
        for skipped in found[found.index(complete[-1]) + 1 :] if complete else ():
            logger.warning(f"Skipped {skipped.path}: it is {skipped.kind.value}")
        checkpoint = (complete or found)[-1].path
    else:
        raise CheckpointError(
            f"{path} {describe(path)}. Give a checkpoint (RUN/checkpoint/step-N, "
            "RUN/checkpoint/boundary), a folder of them, or a run folder"
        )
    if (path / "config.json").is_file() and identify(path) is Kind.HUGGING_FACE:
        raise CheckpointError(f"{path} is exported already; use it as it is")
    if identify(checkpoint) is Kind.INCOMPLETE:
        raise CheckpointError(f"{checkpoint} {describe(checkpoint)}. Give another checkpoint")
    return checkpoint


def checkpoints_of(path: Path) -> Path:
    """Return the folder of a run's checkpoints, given the run folder or itself."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return path / read_config(path)["checkpoint"]["folder"]
    return path / "checkpoint" if (path / "checkpoint").is_dir() else path


def describe(path: Path) -> str:
    """Describe what is at a path that should be a checkpoint: "is ...", for messages."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, which does not exist"
    if not path.exists():
        return "does not exist"
    if not path.is_dir():
        return "is a file, not the folder of a checkpoint"
    kind = identify(path)
    if not any(path.iterdir()):
        return "is an empty folder"
    if kind is Kind.INCOMPLETE:
        missing = ", ".join(missing_weights(path) or [METADATA])
        return f"is {kind.value}: its save or download was cut short (missing: {missing})"
    if kind is not Kind.FOREIGN:
        return f"is {kind.value}"
    folder = checkpoints_of(path)
    if steps := complete_steps(folder):
        what = "a folder of checkpoints" if folder == path else "a run folder"
        names = ", ".join(str(step_folder(folder, step)) for step in steps[-3:])
        return f"is {what}, not one of its checkpoints ({names})"
    return "holds no checkpoint"


def step_folder(folder: Path, step: int, kind: str = "step") -> Path:
    """Return the folder of a step's checkpoint, or of its save or deletion with another kind."""
    return folder / f"{kind}-{step}"


def folders_of_kind(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """Return the steps and the folders of one kind, by ascending step."""
    if not folder.is_dir():
        return []
    return sorted(
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := re.fullmatch(rf"{kind}-(\d+)", path.name))
    )
