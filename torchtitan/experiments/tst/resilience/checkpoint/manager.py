"""Save and resume: upstream's checkpoint manager with checks and atomic saves."""

import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torchtitan.components.checkpoint import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    TRAIN_STATE,
    AsyncMode,
    CheckpointManager,
)
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection
from typing_extensions import override

from ...config.sections import Resilience
from ...upstream.replaced import replaced
from . import inventory
from .damage import DamageError, damages_on_all_ranks
from .hugging_face import save_in_hf
from .inventory import Checkpoint
from .learning_rates import schedule_of_config
from .manifests import CheckpointError, ContradictionError, read_manifest
from .moves import set_aside, tidy
from .ranks import from_rank_0
from .reader import SafeLoadPlanner, SafeReader, read_metadata
from .run import Run, SharedPosition
from .writer import CheckpointWriter


class ResilientCheckpointManager(CheckpointManager):
    """Upstream's manager whose checkpoints are complete or absent, checked, and safe to open.

    It also saves at the boundary, after a stage, and when the run is asked to stop. It resumes on
    any number of data-parallel ranks, refuses a config that contradicts the checkpoint, and does
    not change a run that has ended.

    Args:
        args: arguments of upstream's manager.
        run: the trainer.
        total_steps: number of steps of the run.
        resilience: ``[resilience]`` of the job.
        kwargs: arguments of upstream's manager.
    """

    folder: str

    def __init__(
        self, *args: Any, run: Run, total_steps: int, resilience: Resilience, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.run, self.total_steps, self.resilience = run, total_steps, resilience
        self.save_now = False
        self.checked: Path | None = None

    # Saving

    @override
    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        extra = self.save_now or self.run.stopping
        extra = extra or self.run.keeps_checkpoint(curr_step)
        if extra and self.enable and not self.load_only:
            return True
        return super()._should_save(curr_step, last_step)

    def will_save(self, step: int) -> bool:
        """Return whether :meth:`save` writes a checkpoint after this step, not being the last."""
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
        folder, step = Path(self.folder), int(Path(checkpoint_id).name.removeprefix("step-"))
        manifest = self.run.manifest() | {
            "step": step,
            "boundary": self.run.is_boundary(step),
            "kept": self.run.keeps_checkpoint(step),
            "resumable": TRAIN_STATE in state_dict,
        }
        writer = CheckpointWriter(folder, step, manifest)
        result: Future | AsyncSaveResponse | None = None
        with self._save_errors():
            if to_hf:
                save_in_hf(
                    lambda saving: super(ResilientCheckpointManager, self).dcp_save(
                        state_dict, str(saving), AsyncMode.DISABLED, to_hf=True
                    ),
                    state_dict,
                    self.sd_adapter,
                    folder,
                    manifest,
                    self.run.share,
                )
            elif async_mode is AsyncMode.DISABLED:
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
    def _save_last_step(self, curr_step: int) -> None:
        if curr_step == 0:
            self.last_save_in_hf: bool = False  # a seed checkpoint must be loadable
        super()._save_last_step(curr_step)

    @override
    def _async_wait(self) -> None:
        with self._save_errors():
            super()._async_wait()

    def save_unless_saved(self, step: int) -> None:
        """Save a full checkpoint of a step, unless it has one already."""
        if not self.enable:
            return
        self.wait()
        saved = from_rank_0(self.run.share, lambda: inventory.full_steps(Path(self.folder)))
        if step > 0 and step not in saved:
            self.save_now = True
            self.save(step)
            self.save_now = False
            self.wait()

    def wait(self) -> None:
        """Wait until no save is running.

        Raises:
            CheckpointError: if the last save failed.
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
                for path in folder.glob("saving-*"):  # on a full disk, make room for the next save
                    shutil.rmtree(path, ignore_errors=True)
            steps = inventory.full_steps(folder)
            usable = "There is no complete checkpoint"
            if steps:
                usable = f"The newest complete checkpoint is step-{steps[-1]}"
            raise CheckpointError(
                f"could not write a checkpoint to {folder}: {_causes(error)}. {usable}"
            ) from error

    @override
    def _purge_stale_checkpoints(self) -> None:
        if self.keep_latest_k <= 0 or dist.get_rank() != 0:
            return
        folder = Path(self.folder)
        # neither those that are newer because checkpoint.load_step went back, nor finished models
        steps = [step for step in inventory.full_steps(folder) if step <= self.run.step]
        for step in steps[: -self.keep_latest_k]:
            if not inventory.is_kept(inventory.step_folder(folder, step)):
                self.purge_queue.put(str(set_aside(folder, step, "deleting")))

    # Resuming

    @override
    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        if not self.enable:
            return super().load(step)
        folder = Path(self.folder)
        if not self.load_only:  # with load_only, another run may be using the folder
            for message in from_rank_0(self.run.share, lambda: list(tidy(folder))):
                logger.warning(message)
        checkpoints = from_rank_0(self.run.share, lambda: _identified(folder))
        if step != -1:
            from_rank_0(
                self.run.share,
                lambda: inventory.check_load_step(folder, step, self.exclude_from_loading),
            )
            newer = [c.step for c in checkpoints if c.step > step and c.resumable]
            if newer:
                logger.warning(
                    f"checkpoint.load_step = {step}: there are newer checkpoints ({newer}). A "
                    "launch without checkpoint.load_step resumes from the newest"
                )
        else:
            newest = self._resume_point(checkpoints)
            if newest and newest.kind.is_model and newest.step > 0:
                self.run.step = newest.step
                logger.info(
                    f"The run has ended: {newest.path} is {newest.kind.value}, and training.steps "
                    f"= {self.total_steps}. To train anew, choose another job.dump_folder or "
                    "checkpoint.folder"
                )
                return False
            step = newest.step if newest else -1
        with schedule_of_config(self.states[LR_SCHEDULER]):
            return self._load_step(step)

    def _load_step(self, step: int) -> bool:
        folder = Path(self.folder)
        if step == -1 and folder.exists():
            # Upstream ignores initial_load_path if the folder exists, even an empty folder, such as
            # a kill during the first save leaves. So hide the folder.
            with replaced(self, "folder", str(folder / "none")):
                return super().load()
        return super().load(step)

    def _resume_point(self, checkpoints: list[Checkpoint]) -> Checkpoint | None:
        """Return the checkpoint to resume from, or the final model, checked for damage."""
        damaged: list[Checkpoint] = []

        def damage(found: Checkpoint) -> str:
            damages = damages_on_all_ranks(found.path, self.run.share)
            if damages and not self.resilience.skip_damaged:
                raise DamageError(
                    damages, "To resume from the one before it, set --resilience.skip_damaged"
                )
            damaged.extend([found] * bool(damages))
            return "; ".join(damages)

        def skipped(found: Checkpoint, reason: str) -> None:
            if found in damaged and dist.get_rank() == 0 and not self.load_only:
                aside = set_aside(Path(self.folder), found.step, "damaged")
                logger.warning(f"Renamed {found.path} to {aside}, because it is damaged")
            logger.warning(f"Skipped {found.path}: {reason}")

        point = inventory.resume_point(checkpoints, self.total_steps, damage, skipped)
        if point is None:
            inventory.check_may_start_anew(Path(self.folder), checkpoints)
        else:
            self.checked = point.path
        return point

    @override
    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        checkpoint = Path(checkpoint_id)
        if checkpoint != self.checked and (
            damages := damages_on_all_ranks(checkpoint, self.run.share)
        ):
            raise DamageError(damages, "Load another checkpoint, or copy this one again")
        if from_hf:
            try:
                super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            except (CheckpointException, ValueError, KeyError, AssertionError) as error:
                raise CheckpointError(
                    f"could not load {checkpoint} as the model of model.flavor: {_causes(error)}"
                ) from error
            return
        manifest = read_manifest(checkpoint)
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
        if found := self.run.contradictions(manifest, self.exclude_from_loading):
            if not self.resilience.allow_config_mismatch:
                raise ContradictionError(checkpoint, found)
            for line in found:
                logger.warning(f"Config and checkpoint differ: {line}")

    def _open_streams(self, checkpoint: Path) -> None:
        """Make the loader read as many streams as the checkpoint has data positions."""
        keys = read_metadata(checkpoint).state_dict_metadata
        count = sum(key.startswith(f"{DATALOADER}.dp_rank_") for key in keys)
        loader = self.states[DATALOADER]
        if count and isinstance(loader, SharedPosition):
            loader.set_streams(count)
        elif count not in (0, self.run.dp_degree):
            raise CheckpointError(
                f"{checkpoint} has the data positions of {count} data-parallel ranks, but this "
                f"launch has {self.run.dp_degree}, and {type(loader).__name__} cannot redistribute "
                f"them. Launch with {count} data-parallel ranks, or start the data anew with "
                "checkpoint.exclude_from_loading = ['dataloader']. A run can resume on another "
                "number if its training.dataloader.num_workers is at most 1 from the start"
            )


def _identified(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints with their kinds read, so that all ranks see what rank 0 sees."""
    found = inventory.list_checkpoints(folder)
    for checkpoint in found:
        _ = checkpoint.kind
    return found


def _causes(error: BaseException) -> str:
    """Return what went wrong, by rank if DCP reports ranks."""
    if not isinstance(error, CheckpointException):
        return str(error)
    causes = {
        f"{type(cause).__name__}: {cause}": rank for rank, (cause, _) in error.failures.items()
    }
    return "; ".join(f"rank {rank}: {cause}" for cause, rank in causes.items())
