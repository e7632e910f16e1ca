"""Add pages to the site that are not in docs/: those of the top folder, and the API of ``core``.

mkdocs calls these functions (``hooks`` in mkdocs.yml).
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "torchtitan/experiments/tst/core"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site's files."""
    for name, page in PAGES.items():
        text = link_within_the_site((ROOT / name).read_text())
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "api.md", content=api()))
    return files


def link_within_the_site(text: str) -> str:
    """Return a page of the top folder with links that hold in the site.

    A link to a file that the site does not have becomes its name.
    """

    def replace(match: re.Match[str]) -> str:
        label, target = match.groups()
        name, hash_, anchor = target.partition("#")
        if "://" in target or not name:
            return match[0]
        page = PAGES.get(name, name.removeprefix("docs/") if name.startswith("docs/") else None)
        return f"[{label}]({page}{hash_}{anchor})" if page else f"`{name}`"

    return re.sub(r"\[([^]]*)\]\(([^)\s]+)\)", replace, text)


def api() -> str:
    """Return the page with the public names of each module of ``core``."""
    modules = sorted(path.stem for path in CORE.glob("*.py") if not path.stem.startswith("_"))
    modules += ["conformance.implementation", "conformance.run"]
    head = (
        "# API of core\n\n"
        "`torchtitan.experiments.tst.core` needs only torch. Import the names below from it, and "
        "those of the conformance suite from `core.conformance`.\n"
    )
    return "\n".join([head, *(f"::: core.{module}\n" for module in modules)])
