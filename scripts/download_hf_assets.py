"""Fetch a model's tokenizer and config from the Hugging Face hub, as hf_assets_path wants them.

    python scripts/download_hf_assets.py --repo_id meta-llama/Meta-Llama-3-8B
    python scripts/download_hf_assets.py --repo_id Qwen/Qwen3-30B-A3B --assets tokenizer index

They come into assets/hf/Meta-Llama-3-8B and so on. What is there already is not fetched again.
"""

import sys
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download

from command_line import documented_parser
from torchtitan.experiments.tst.data.tokenizer import open_tokenizer
from torchtitan.experiments.tst.data.tokenizer_identity import entries

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


def download(
    repo_id: str,
    assets: list[str],
    local_dir: Path,
    token: str | None = None,
    revision: str | None = None,
) -> Path:
    """Fetch assets of a model into ``local_dir`` / its name.

    Args:
        repo_id: owner/name on the hub.
        assets: some of :data:`ASSETS`.
        local_dir: above the folder to fill.
        token: of the hub; by default HF_TOKEN, or that of ``hf auth login``.
        revision: branch, tag or commit; by default main.

    Returns:
        The folder.

    Raises:
        ValueError: if the model has none of one of the assets, or its tokenizer cannot be read.
        Exception: of the hub, for a name, permission or connection that fails.
    """
    folder = local_dir / repo_id.rpartition("/")[2]
    patterns = [pattern for name in assets for pattern in ASSETS[name]]
    snapshot_download(
        repo_id, allow_patterns=patterns, local_dir=folder, token=token, revision=revision
    )
    names = [path.name for path in folder.iterdir()]
    for asset in assets:
        if not any(fnmatch(name, pattern) for name in names for pattern in ASSETS[asset]):
            raise ValueError(f"{repo_id} has no {asset} ({', '.join(ASSETS[asset])})")
    return folder


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--repo_id", required=True, help="owner/name on the hub")
    parser.add_argument(
        "--assets",
        nargs="+",
        choices=ASSETS,
        default=["tokenizer", "config"],
        help="default: tokenizer config",
    )
    parser.add_argument("--local_dir", type=Path, default="assets/hf", help="default: %(default)s")
    parser.add_argument("--revision", help="branch, tag or commit; default: main")
    parser.add_argument(
        "--hf_token", help="for models behind a licence; default: HF_TOKEN, or `hf auth login`"
    )
    args = parser.parse_args()
    try:
        folder = download(args.repo_id, args.assets, args.local_dir, args.hf_token, args.revision)
        if "tokenizer" in args.assets:
            tokenizer = open_tokenizer(folder)
            print(f"tokenizer with {entries(tokenizer):,} entries")
    except Exception as error:  # the hub's have no common class but this one
        sys.exit(f"error: {args.repo_id}: {error}")
    print(f"model.hf_assets_path = {folder}")


if __name__ == "__main__":
    main()
