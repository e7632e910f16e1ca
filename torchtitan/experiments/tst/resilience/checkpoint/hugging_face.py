"""Save a model in Hugging Face format; like any other checkpoint, it is complete or absent."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchtitan.protocols import BaseStateDictAdapter
from torchtitan.tools.logging import logger

from ...upstream.names import SHARDED_DIR_NAME, WEIGHTS_INDEX
from .inventory import step_folder
from .manifests import entry_of, write_manifest
from .moves import publish
from .ranks import Share, from_rank_0, on_all_ranks


def save_in_hf(
    save: Callable[[Path], Any],
    state_dict: dict[str, Any],
    adapter: BaseStateDictAdapter,
    folder: Path,
    manifest: dict[str, Any],
    share: Share,
) -> None:
    """Save a model by upstream's method, under the name ``saving-N`` until it is complete.

    Args:
        save: upstream's method, given the folder to save to.
        state_dict: the state dict that it saves.
        adapter: state-dict adapter of the model.
        folder: folder of the run's checkpoints.
        manifest: content of the manifest except for the files.
        share: returns a value of every rank.
    """
    saving = step_folder(folder, manifest["step"], "saving")
    from_rank_0(share, lambda: shutil.rmtree(saving, ignore_errors=True))
    _drop_index_of_another_model(adapter, state_dict, share)
    save(saving)

    written = from_rank_0(
        share, lambda: sorted(path.name for path in saving.iterdir() if path.is_file())
    )

    def entries_of_rank() -> dict[str, dict[str, Any]]:
        mine = written[dist.get_rank() :: dist.get_world_size()]
        return {name: entry_of(saving / name) for name in mine}

    entries: dict[str, dict[str, Any]] = {}
    for of_rank in on_all_ranks(share, entries_of_rank):
        entries |= of_rank

    def finish() -> None:
        shutil.rmtree(saving / SHARDED_DIR_NAME)  # parts of the complete files
        write_manifest(saving, manifest, entries)
        publish(folder, manifest["step"], boundary=False)

    from_rank_0(share, finish)


def _drop_index_of_another_model(
    adapter: BaseStateDictAdapter, state_dict: dict[str, Any], share: Share
) -> None:
    """Save all weights in one file where ``model.hf_assets_path`` has no index of this model."""
    mapping = adapter.fqn_to_index_mapping
    mine = set(adapter.to_hf(state_dict)) if mapping else set()
    indices = share((mapping, mine))
    names = set().union(*(names for _, names in indices))  # PP and EP ranks have a part each
    if any(index is None or index.keys() != names for index, _ in indices):
        if any(index for index, _ in indices):
            logger.warning(
                f"model.hf_assets_path has a {WEIGHTS_INDEX} of another model: all weights are "
                "saved in one file"
            )
        adapter.fqn_to_index_mapping = None
