"""Fetch a model's tokenizer and config from the Hugging Face hub, for model.hf_assets_path.

    tst assets meta-llama/Meta-Llama-3-8B
    tst assets Qwen/Qwen3-30B-A3B --assets tokenizer index

They come into assets/hf/Meta-Llama-3-8B and so on. What is there already is not fetched again.
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
    """Fetch assets.

    Args:
        repo_id: The model on the hub.
        assets: What to fetch.
        local_dir: Above the folder to fill.
        revision: Branch, tag or commit. By default main.
        hf_token: For models behind a licence. By default HF_TOKEN, or that of `hf auth login`.
    """
    folder = download(repo_id, assets, local_dir, hf_token, revision)
    if "tokenizer" in assets:
        print(f"tokenizer with {vocabulary(folder):,} entries")
    print(f"model.hf_assets_path = {folder}")
