#!/usr/bin/env python
"""Write what TorchTitan 0.3 does not know of 0.2.2: the keys of a job's TOML, and the flavors.

    scripts/write_titan03_tables.py            # write the files
    scripts/write_titan03_tables.py --check    # fail if they are not current

``titan03/keys.json`` has the type and the default of each key of TorchTitan 0.2.2's own sections.
``titan03/flavors.json`` has the model args of each flavor of llama3 and qwen3, ours included, and
the number of parameters of its model. Both are read where TorchTitan 0.3 is installed.
``tests/titan03/numbers.json`` has what ``tst check`` prints of each config in train_configs/.
"""

import dataclasses
import json
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import torch
import torchtitan.protocols.train_spec as train_spec_module
from torchtitan.config import JobConfig

from command_line import documented_parser
from torchtitan.experiments.tst import extension as _registers_flavors  # noqa: F401
from torchtitan.experiments.tst import start
from torchtitan.experiments.tst.config.layout import ranks_of_layout
from torchtitan.experiments.tst.config.values import kinds_of

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "torchtitan/experiments/tst/titan03"
NUMBERS = ROOT / "tests/titan03/numbers.json"
MODELS = ("llama3", "qwen3")


def keys() -> dict[str, Any]:
    """Return the type (as text) and the default of each key of TorchTitan 0.2.2's job config."""
    table = {}
    for key, kind in kinds_of(JobConfig).items():
        default: Any = JobConfig()
        for name in key.split("."):
            default = getattr(default, name)
        table[key] = {"type": _text_of(kind), "default": default}
    return table


def _text_of(kind: Any) -> str:
    """Return an annotation as Python text, the same with each version of Python."""
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(map(_text_of, get_args(kind)))
    if kind is NoneType:
        return "None"
    return kind.__name__ if type(kind) is type else str(kind).replace("typing.", "")


def flavors() -> dict[str, Any]:
    """Return the model args and the number of parameters of each flavor of each model."""
    table: dict[str, Any] = {}
    for name in MODELS:
        spec = train_spec_module.get_train_spec(name)
        table[name] = {}
        for flavor, args in spec.model_args.items():
            with torch.device("meta"):
                parameters = sum(p.numel() for p in spec.model_cls(args).parameters())
            values = {key: value for key, value in _plain(args).items() if value is not None}
            table[name][flavor] = {"parameters": parameters, "args": values}
    return table


def _plain(args: Any) -> dict[str, Any]:
    """Return model args as plain values, without what a job sets; experts only if there are any."""
    values = dataclasses.asdict(args)
    experts = values.pop("moe_args", None)
    if experts and values["moe_enabled"]:
        values["moe_args"] = {k: v for k, v in experts.items() if not k.startswith("_")}
    return {key: value for key, value in values.items() if not key.startswith("_")}


def numbers() -> dict[str, list[str]]:
    """Return what ``tst check`` prints of each config, on as many ranks as its layout needs."""
    table = {}
    for path in sorted((ROOT / "train_configs").rglob("*.toml")):
        job = start.read([f"--job.config_file={path}"])
        ranks, _ = ranks_of_layout(job)
        lines = start.check(job, ranks, machine=False, files=False)
        table[str(path.relative_to(ROOT))] = lines
    return table


def texts() -> dict[Path, str]:
    """Return the text of each file, with a line for each key, flavor or config."""
    of_models = (f' "{name}": {_lines(table, " ")}' for name, table in flavors().items())
    return {
        FOLDER / "keys.json": _lines(keys(), ""),
        FOLDER / "flavors.json": "{\n" + ",\n".join(of_models) + "\n}\n",
        NUMBERS: _lines(numbers(), ""),
    }


def _lines(table: dict[str, Any], indent: str) -> str:
    rows = [f"{indent} {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items()]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}" + ("" if indent else "\n")


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if not current")
    check = parser.parse_args().check
    for path, text in texts().items():
        if not check:
            path.write_text(text)
        elif path.read_text() != text:
            sys.exit(f"{path} is not current; run scripts/write_titan03_tables.py")


if __name__ == "__main__":
    main()
