"""Check whether a checkpoint is what was written; each rank reads a share of its files."""

from pathlib import Path

import torch.distributed as dist
from torchtitan.tools.logging import logger

from . import inventory
from .inventory import Kind
from .manifests import MANIFEST, CheckpointError, damages, read_manifest
from .ranks import Share
from .reader import read_metadata


class DamageError(CheckpointError):
    """A checkpoint whose files are not what was written."""

    def __init__(self, found: list[str], advice: str):
        listed = "".join(f"\n  {line}" for line in found)
        super().__init__(f"a checkpoint is damaged:{listed}\n{advice}")


def damages_on_all_ranks(checkpoint: Path, share: Share) -> list[str]:
    """Return the damages that any rank has found; the same on all ranks.

    Args:
        checkpoint: a checkpoint of any kind.
        share: returns a value of every rank.
    """
    try:
        manifest = read_manifest(checkpoint)
        if manifest is None:
            _check_readable(checkpoint)
        written = manifest["files"] if manifest else {}
        # largest first, so that the shares have about the same size
        names = sorted(written, key=lambda name: (-written[name]["bytes"], name))
        mine = names[dist.get_rank() :: dist.get_world_size()]
        found = damages(checkpoint, {name: written[name] for name in mine})
    except (CheckpointError, OSError) as error:
        found = [str(error)]
    return sorted({damage for of_rank in share(found) for damage in of_rank})


def _check_readable(checkpoint: Path) -> None:
    """Check what can be checked in a checkpoint without a manifest."""
    if inventory.identify(checkpoint) is Kind.HUGGING_FACE:
        inventory.check_weights(checkpoint)
        return
    logger.warning(
        f"{checkpoint} has no {MANIFEST} (TorchTitan's own trainer writes none): it is not checked "
        "for damage"
    )
    read_metadata(checkpoint)
