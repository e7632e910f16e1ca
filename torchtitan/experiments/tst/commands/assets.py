"""Download a model's tokenizer and config from the Hugging Face hub.

    tst assets meta-llama/Meta-Llama-3-8B
    tst assets Qwen/Qwen3-30B-A3B --assets tokenizer index

The first example writes to assets/hf/Meta-Llama-3-8B. Set model.hf_assets_path of a job to this
folder. Files that are there already are not downloaded again.
"""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..data.assets import download, vocabulary


def main(
    repo_id: Annotated[Positional[str], arg(metavar="OWNER/NAME")],
    /,
    assets: tuple[Literal["tokenizer", "config", "index", "safetensors"], ...] = (
        "tokenizer",
        "config",
    ),
    local_dir: Path = Path("assets/hf"),
    revision: str | None = None,
    hf_token: str | None = None,
) -> None:
    """Download assets.

    Args:
        repo_id: Name of the model on the hub.
        assets: What to download.
        local_dir: Parent folder. The model gets a folder with its name in it.
        revision: Branch, tag or commit. By default main.
        hf_token: Token for models behind a license.
            By default HF_TOKEN, or that of `hf auth login`.
    """
    folder = download(repo_id, assets, local_dir, hf_token, revision)
    if "tokenizer" in assets:
        print(f"tokenizer with {vocabulary(folder):,} entries")
    print(f"model.hf_assets_path = {folder}")
