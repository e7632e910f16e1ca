"""Download tokenizers and configs from the Hugging Face hub, for ``model.hf_assets_path``."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download

from ..errors import UserError
from .tokenizer import TokenizerError, open_tokenizer
from .tokenizer_identity import entries

ASSETS = {
    "tokenizer": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    ),
    "config": ("config.json", "generation_config.json"),
    "index": ("model.safetensors.index.json",),
    "safetensors": ("*.safetensors",),
}


class AssetsError(UserError, RuntimeError):
    """Assets that cannot be downloaded; the message says why."""


def download(
    repo_id: str,
    assets: Sequence[str],
    local_dir: Path,
    token: str | None = None,
    revision: str | None = None,
) -> Path:
    """Download assets of a model into a folder with its name, below ``local_dir``.

    Args:
        repo_id: owner/name of the model on the hub.
        assets: some of :data:`ASSETS`.
        local_dir: parent of the folder to fill.
        token: token of the hub; by default HF_TOKEN, or that of ``hf auth login``.
        revision: branch, tag or commit; by default main.

    Returns:
        The folder.

    Raises:
        AssetsError: if the name, the permission or the connection fails, if the model lacks one of
            the assets, or if its tokenizer cannot be read.
    """
    folder = local_dir / repo_id.rpartition("/")[2]
    patterns = [pattern for name in assets for pattern in ASSETS[name]]
    try:
        snapshot_download(
            repo_id, allow_patterns=patterns, local_dir=folder, token=token, revision=revision
        )
    except Exception as error:  # the hub's errors have no other common class
        raise AssetsError(
            f"cannot download {repo_id} from the hub; check its name, your token and the "
            f"connection: {error}"
        ) from error
    names = [path.name for path in folder.iterdir()]
    for asset in assets:
        if not any(fnmatch(name, pattern) for name in names for pattern in ASSETS[asset]):
            raise AssetsError(f"{repo_id} has no {asset} ({', '.join(ASSETS[asset])})")
    if "tokenizer" in assets:
        try:
            open_tokenizer(folder)
        except TokenizerError as error:
            raise AssetsError(f"{repo_id}: {error}") from error
    return folder


def vocabulary(folder: Path) -> int:
    """Return the number of entries of a downloaded tokenizer.

    Raises:
        TokenizerError: if it cannot be read.
    """
    return entries(open_tokenizer(folder))
