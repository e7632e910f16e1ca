"""The job configs that come with the package: the demo's, debug ones, and the paper's runs."""

from collections.abc import Iterator
from pathlib import Path

NAME = "train_configs"
_PACKAGE = Path(__file__).parents[1]
_FOLDERS = ("demo", "debug", "paper")


def shipped_configs() -> Iterator[tuple[Path, str]]:
    """Yield the path of each config, below train_configs, and the first sentence of its comment.

    Raises:
        FileNotFoundError: if this copy of the package has no configs.
    """
    folder = _folder()
    for name in _FOLDERS:
        for path in sorted(folder.joinpath(name).rglob("*.toml")):
            comment = path.read_text().partition("\n\n")[0].replace("\n# ", " ")
            yield path.relative_to(folder), comment.removeprefix("# ").partition(". ")[0]


def copy_configs(folder: Path) -> list[Path]:
    """Copy the configs to FOLDER/train_configs, all of them or nothing.

    Raises:
        FileExistsError: if a file exists already and differs.
        FileNotFoundError: if this copy of the package has no configs.
    """
    source = _folder()
    content = {folder / NAME / path: (source / path).read_text() for path, _ in shipped_configs()}
    for path, text in content.items():
        if path.exists() and path.read_text() != text:
            raise FileExistsError(
                f"{path} exists already and differs from the package's; give another folder"
            )
    for path, text in content.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(content)


def _folder() -> Path:
    """Return the folder of the configs: inside an installed package, next to it in a checkout."""
    for folder in (_PACKAGE / NAME, _PACKAGE.parents[2] / NAME):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        "this copy of torchtitan.experiments.tst has no job configs; install them with "
        "`pip install torchtitan-tst`"
    )
