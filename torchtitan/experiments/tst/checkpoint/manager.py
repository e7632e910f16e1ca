"""Saving and resuming: upstream's checkpoint manager, held to more."""

import functools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torchtitan.components.checkpoint import (
    DATALOADER,
    MODEL,
    TRAIN_STATE,
    AsyncMode,
    CheckpointManager,
)
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection
from typing_extensions import override

from ..data.streams import StreamsDataloader
from . import files
from .agreement import contradiction_error, contradictions
from .files import CheckpointError
from .reader import SafeLoadPlanner, SafeReader, read_metadata
from .writer import CheckpointWriter


class Run(Protocol):
    """What the manager asks of the trainer."""

    step: int
    dp_degree: int

    @property
    def stopping(self) -> bool:
        """Whether the run ends after this step, which then needs a checkpoint."""

    def manifest(self) -> dict[str, Any]:
        """What to write into the manifest of a checkpoint of now; "run" holds the run's facts."""

    def restore(self, manifest: dict[str, Any]) -> None:
        """Take on what the manifest holds, after the states are loaded."""

    def share(self, value: Any) -> list[Any]:
        """``value`` of every rank, on every rank."""


class ResilientCheckpointManager(CheckpointManager):
    """Upstream's manager whose checkpoints are complete or absent, checked, and safe to open.

    Beside that, it saves after the last superposition step and when the run is asked to stop,
    resumes on any number of data-parallel ranks, and refuses a config that contradicts the
    checkpoint.
    """

    folder: str
    run: Run
    boundary: int
    skip_damaged: bool
    allow_config_mismatch: bool
    save_now: bool
    checked: Path | None

    @classmethod
    def adopt(
        cls,
        checkpointer: CheckpointManager,
        run: Run,
        boundary: int,
        skip_damaged: bool,
        allow_config_mismatch: bool,
    ) -> "ResilientCheckpointManager":
        """Make the manager that upstream's trainer has built, without a hook, one of this class.

        Args:
            checkpointer: upstream's.
            run: the trainer.
            boundary: the last superposition step; 0 for none.
            skip_damaged: resume from the checkpoint before a damaged one.
            allow_config_mismatch: resume though config and checkpoint contradict each other.
        """
        checkpointer.__class__ = cls
        assert isinstance(checkpointer, cls)
        checkpointer.run, checkpointer.boundary = run, boundary
        checkpointer.skip_damaged = skip_damaged
        checkpointer.allow_config_mismatch = allow_config_mismatch
        checkpointer.save_now, checkpointer.checked = False, None
        return checkpointer

    # Saving

    @override
    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        extra = self.save_now or self.run.stopping
        extra = extra or (self.boundary > 0 and curr_step == self.boundary)
        if extra and self.enable and not self.load_only:
            return True
        return super()._should_save(curr_step, last_step)

    def will_save(self, step: int) -> bool:
        """Whether :meth:`save` writes a checkpoint after this step, which is not the last."""
        return self._should_save(step)

    @override
    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Future | AsyncSaveResponse | None:
        if to_hf:
            return super().dcp_save(
                state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf
            )
        folder, step = Path(self.folder), int(Path(checkpoint_id).name.removeprefix("step-"))
        manifest = self.run.manifest() | {
            "step": step,
            "boundary": step == self.boundary > 0,
            "resumable": TRAIN_STATE in state_dict,
        }
        writer = CheckpointWriter(folder, step, manifest)
        result: Future | AsyncSaveResponse | None = None
        with self._save_errors():
            if async_mode is AsyncMode.DISABLED:
                dcp.save(state_dict, storage_writer=writer)
            elif async_mode is AsyncMode.ASYNC:
                result = dcp.async_save(state_dict, storage_writer=writer, process_group=self.pg)
            else:
                result = dcp.async_save(
                    state_dict,
                    storage_writer=writer,
                    process_group=self.pg,
                    async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                    async_stager=self.stager,
                )
        if enable_garbage_collection:
            GarbageCollection.collect("GC collection invoked by checkpointer.")
        return result

    @override
    def _async_wait(self) -> None:
        with self._save_errors():
            super()._async_wait()

    def save_unless_saved(self, step: int) -> None:
        """A whole checkpoint of a step that may have one already."""
        if not self.enable:
            return
        self.wait()
        saved = self._from_rank_0(lambda: files.complete_steps(Path(self.folder)))
        if step > 0 and step not in saved:
            self.save_now = True
            self.save(step)
            self.save_now = False
            self.wait()

    def wait(self) -> None:
        """Until no save is going on.

        Raises:
            CheckpointError: if the last one failed.
        """
        if self.enable:
            self._async_wait()

    @contextmanager
    def _save_errors(self) -> Iterator[None]:
        try:
            yield
        except (CheckpointException, OSError, RuntimeError) as error:
            folder = Path(self.folder)
            if dist.get_rank() == 0:
                for path in folder.glob("saving-*"):  # on a full disk, room for the next one
                    shutil.rmtree(path, ignore_errors=True)
            steps = files.complete_steps(folder)
            usable = f"step-{steps[-1]} there is complete" if steps else "There is no earlier one"
            raise CheckpointError(
                f"could not write a checkpoint to {folder}: {_causes(error)}. {usable}"
            ) from error

    @override
    def _purge_stale_checkpoints(self) -> None:
        if self.keep_latest_k <= 0 or dist.get_rank() != 0:
            return
        folder = Path(self.folder)
        # not those of a time before checkpoint.load_step went back
        steps = [step for step in files.complete_steps(folder) if step <= self.run.step]
        for step in steps[: -self.keep_latest_k]:
            if not files.is_boundary(files.step_folder(folder, step)):
                self.purge_queue.put(str(files.set_aside(folder, step, "deleting")))

    # Resuming

    @override
    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        if not self.enable:
            return super().load(step)
        folder = Path(self.folder)
        if dist.get_rank() == 0 and not self.load_only:  # others may be at work there
            for message in files.tidy(folder):
                logger.warning(message)
        steps = self._from_rank_0(lambda: _newest_first(folder))
        if step != -1:
            newer = [n for n in steps if n > step]
            if newer:
                logger.warning(
                    f"checkpoint.load_step = {step}: there are newer checkpoints ({newer}), which "
                    "a launch without it will go on from"
                )
        else:
            step = self._newest_usable(steps)
        if step == -1 and folder.exists():
            # As if the folder were not there: upstream takes an empty one, such as a kill during
            # the first save leaves, for the start of a run and ignores initial_load_path.
            self.folder = str(folder / "none")
            try:
                return super().load()
            finally:
                self.folder = str(folder)
        return super().load(step)

    def _newest_usable(self, steps: list[int]) -> int:
        folder = Path(self.folder)
        for step in steps:
            checkpoint = files.step_folder(folder, step)
            reason = self._from_rank_0(functools.partial(_not_resumable, checkpoint))
            if not reason and (damages := self._damages(checkpoint)):
                if not self.skip_damaged:
                    raise _damage_error(damages)
                reason = "; ".join(damages)
                if dist.get_rank() == 0 and not self.load_only:
                    aside = files.set_aside(folder, step, "damaged")
                    logger.warning(f"{checkpoint} is now {aside}")
            if not reason:
                self.checked = checkpoint
                return step
            logger.warning(f"Skipped {checkpoint}: {reason}")
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {folder} can be resumed (see above). To start anew "
                "choose another job.dump_folder or checkpoint.folder"
            )
        return -1

    def _damages(self, checkpoint: Path) -> list[str]:
        """What is damaged, on any rank; every rank reads its share of the files."""
        try:
            manifest = files.read_manifest(checkpoint)
            if manifest is None:
                logger.warning(
                    f"{checkpoint} has no {files.MANIFEST}, as with TorchTitan's own trainer: it "
                    "is not checked for damage"
                )
                read_metadata(checkpoint)
            written = manifest["files"] if manifest else {}
            # largest first, so that the shares are of about the same size
            names = sorted(written, key=lambda name: (-written[name]["bytes"], name))
            share = names[dist.get_rank() :: dist.get_world_size()]
            found = files.damages(checkpoint, {name: written[name] for name in share})
        except (CheckpointError, OSError) as error:
            found = [str(error)]
        return sorted({damage for of_rank in self.run.share(found) for damage in of_rank})

    @override
    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        if from_hf:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        checkpoint = Path(checkpoint_id)
        if checkpoint != self.checked and (damages := self._damages(checkpoint)):
            raise _damage_error(damages)
        manifest = files.read_manifest(checkpoint)
        if TRAIN_STATE in state_dict and manifest:
            self._check_agreement(checkpoint, manifest)
        try:
            if DATALOADER in state_dict:
                self._open_streams(checkpoint)
            dcp.load(
                state_dict, storage_reader=SafeReader(checkpoint_id), planner=SafeLoadPlanner()
            )
        except (CheckpointException, ValueError) as error:
            raise CheckpointError(f"could not load {checkpoint}: {_causes(error)}") from error
        if MODEL in self.states:
            self.states[MODEL].load_state_dict(state_dict)
        if TRAIN_STATE in state_dict and manifest:
            self.run.restore(manifest)
        elif manifest and manifest["boundary"]:
            logger.warning(
                f"{checkpoint} is a boundary checkpoint, but only its model is loaded: training "
                "starts at step 1. For the recovery phase set "
                "checkpoint.initial_load_model_only = false"
            )

    def _check_agreement(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        facts = self.run.manifest()["run"]
        if found := contradictions(manifest, facts, self.exclude_from_loading):
            if not self.allow_config_mismatch:
                raise CheckpointError(contradiction_error(checkpoint, found))
            for line in found:
                logger.warning(f"Config and checkpoint differ: {line}")

    def _open_streams(self, checkpoint: Path) -> None:
        """Have the loader read as many streams as the checkpoint has positions of."""
        keys = read_metadata(checkpoint).state_dict_metadata
        count = sum(key.startswith(f"{DATALOADER}.dp_rank_") for key in keys)
        loader = self.states[DATALOADER]
        if count and isinstance(loader, StreamsDataloader):
            loader.set_streams(count)
        elif count not in (0, self.run.dp_degree):
            raise CheckpointError(
                f"{checkpoint} has the position in the data of {count} data-parallel ranks, this "
                f"launch has {self.run.dp_degree}, and {type(loader).__name__} cannot share it out "
                "anew. Launch with as many as before; or with training.dataloader.num_workers at "
                "most 1 from the start of a run, which can be shared out; or start the data anew "
                "with checkpoint.exclude_from_loading = ['dataloader']"
            )

    def _from_rank_0(self, function: Callable[[], Any]) -> Any:
        """The function's result on rank 0, there called alone."""
        return self.run.share(function() if dist.get_rank() == 0 else None)[0]


def _newest_first(folder: Path) -> list[int]:
    """Steps of a run's complete checkpoints; says what is not complete."""
    for path in files.incomplete(folder):
        logger.warning(f"Skipped {path}: its save was cut short (no {files.METADATA})")
    return files.complete_steps(folder)[::-1]


def _not_resumable(checkpoint: Path) -> str:
    """Why a job cannot go on from it though it is complete; "" if it can, or is damaged."""
    if checkpoint.name == "step-0":
        return ""  # a seed checkpoint, which is of the model only
    try:
        keys = read_metadata(checkpoint).state_dict_metadata
    except CheckpointError:
        return ""  # damaged, which is looked into when its turn comes
    if any(key.startswith(f"{TRAIN_STATE}.") for key in keys):
        return ""
    return "it holds the model only, as checkpoint.last_save_model_only has it"


def _damage_error(damages: list[str]) -> CheckpointError:
    listed = "".join(f"\n  {line}" for line in damages)
    return CheckpointError(
        f"a checkpoint is damaged:{listed}\n"
        "--resilience.skip_damaged goes on from the one before it"
    )


def _causes(error: BaseException) -> str:
    """What went wrong, by rank if DCP says so."""
    if not isinstance(error, CheckpointException):
        return str(error)
    causes = {
        f"{type(cause).__name__}: {cause}": rank for rank, (cause, _) in error.failures.items()
    }
    return "; ".join(f"rank {rank}: {cause}" for cause, rank in causes.items())
