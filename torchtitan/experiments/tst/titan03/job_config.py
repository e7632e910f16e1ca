"""The job config of TorchTitan 0.2.2 where TorchTitan 0.3 is installed, which has none.

``keys.json`` has the keys of TorchTitan's own sections, with their types and defaults.
The other sections are those of this package.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import tyro
from torchtitan.config import ConfigManager
from tyro.constructors import ConstructorRegistry

from ..config import sections
from ..config.command_line import refused_in_one_line, register_stages
from ..config.job_file import option, read_toml
from ..config.values import check_toml, check_values

_OURS = {
    "superposition": sections.Superposition,
    "token_shards": sections.TokenShards,
    "text_dataset": sections.TextDataset,
    "lm_head": sections.LMHead,
    "load_balance": sections.LoadBalance,
    "resilience": sections.Resilience,
}


def _class_of(name: str, keys: dict[str, dict[str, Any]]) -> type:
    """Return the dataclass of a section.

    Args:
        name: name of the class.
        keys: its keys, such as "dataloader.num_workers", each with its type and its default.
    """
    subsections: dict[str, dict[str, Any]] = {}
    fields: list[tuple[str, Any, Any]] = []
    for key, entry in keys.items():
        section, dot, rest = key.partition(".")
        if dot:
            subsections.setdefault(section, {})[rest] = entry
            continue
        kind = eval(entry["type"], {"Literal": Literal})
        fields.append((key, kind, _field(entry["default"])))
    for section, rest_of_keys in subsections.items():
        cls = _class_of(section.title(), rest_of_keys)
        fields.append((section, cls, dataclasses.field(default_factory=cls)))
    return dataclasses.make_dataclass(name, fields)


def _field(default: Any) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default))
    return dataclasses.field(default=default)


_UPSTREAM = _class_of("JobConfig", json.loads(Path(__file__).with_name("keys.json").read_text()))

JobConfig: Any = dataclasses.make_dataclass(
    "JobConfig",
    [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in _OURS.items()],
    bases=(_UPSTREAM,),
)


def read(arguments: list[str]) -> Any:
    """Return the config of a job: the defaults of TorchTitan 0.2.2, the TOML, the command line.

    Args:
        arguments: arguments of the job, as on the command line.

    Raises:
        ConfigError: for a file or a command line that cannot be read, an unknown key, or a value
            that is not of its key's type, choices and range.
    """
    path = option("config_file", arguments)
    toml = {} if path is None else read_toml(path)
    check_toml(JobConfig, toml)
    registry = ConstructorRegistry()
    ConfigManager.register_tyro_rules(registry)
    register_stages(registry)
    with refused_in_one_line(arguments, lambda: JobConfig):
        job = tyro.cli(
            JobConfig, args=arguments, default=_filled(JobConfig, toml), registry=registry
        )
    check_values(job)
    if job.model.tokenizer_path:  # its name in older versions
        job.model.hf_assets_path = job.model.tokenizer_path
    return job


def _filled(section: Any, table: dict[str, Any]) -> Any:
    """Return a section with the values of a TOML."""
    kinds = {field.name: field.type for field in dataclasses.fields(section)}
    return section(
        **{
            name: _filled(kinds[name], value) if dataclasses.is_dataclass(kinds[name]) else value
            for name, value in table.items()
        }
    )


def keys_of(job: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of all keys of a job, by keys such as ``training.steps``."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(job):
        value, key = getattr(job, field.name), f"{prefix}{field.name}"
        values |= keys_of(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return values
