"""The config manager: it reads a job's TOML and its command line into a job config."""

import functools
import sys
from pathlib import Path
from typing import Any

from torchtitan.config import ConfigManager
from torchtitan.config import JobConfig as UpstreamJobConfig
from typing_extensions import override
from tyro.constructors import ConstructorRegistry

from ..errors import ConfigError, in_one_line
from .command_line import refused_in_one_line, register_stages
from .job_config import JobConfig
from .job_file import option, read_toml
from .values import check_toml

EXTENSION = "torchtitan.experiments.tst.extension"
# Modules with our flavors and datasets in older versions, for experimental.custom_import.
OLD_EXTENSIONS = (
    "torchtitan.experiments.tst.models",
    "torchtitan.experiments.tst.data.datasets",
)


class SuperpositionConfigManager(ConfigManager):
    """Upstream's config manager (TOML, then command line) for :class:`JobConfig`.

    Raises:
        ConfigError: from :meth:`parse_args`, for a file or a command line that cannot be read, an
            unknown key, or a value that is not of its key's type, choices and range.
    """

    def __init__(self) -> None:
        super().__init__(JobConfig)
        self._extended_cls: type[UpstreamJobConfig] = JobConfig

    @override
    @staticmethod
    @functools.cache
    def register_tyro_rules(registry: ConstructorRegistry) -> None:
        """Register tyro's rules once for all managers: each one slows down all later parsing."""
        ConfigManager.register_tyro_rules(registry)
        register_stages(registry)

    @override
    def parse_args(self, args: list[str] | None = None) -> JobConfig:
        args = sys.argv[1:] if args is None else args
        with refused_in_one_line(args, lambda: self._extended_cls):
            config = super().parse_args(args)
        experimental = config.experimental
        if experimental.custom_import in OLD_EXTENSIONS:
            experimental.custom_import = EXTENSION
        return config

    @override
    def _maybe_load_toml(self, args: list[str]) -> dict[str, Any] | None:
        path = option("config_file", args)
        return None if path is None else read_toml(path)

    @override
    def _maybe_add_custom_config(
        self, args: list[str], toml_values: dict[str, Any] | None
    ) -> type[UpstreamJobConfig]:
        try:
            self._extended_cls = super()._maybe_add_custom_config(args, toml_values)
        except Exception as error:  # the module may do anything
            key, of_toml = "custom_config_module", (toml_values or {}).get("job", {})
            name = option(key, args) or of_toml[key]
            raise ConfigError(
                f"job.{key}", name, f"cannot be imported: {in_one_line(error)}"
            ) from error
        check_toml(self._extended_cls, toml_values or {})
        return self._extended_cls

    @override
    def _validate_config(self) -> None:
        model = self.config.model
        path = model.tokenizer_path or model.hf_assets_path
        if path.endswith("tokenizer.model") and Path(path).is_file():
            # Upstream's own check would raise a bare Exception.
            raise ConfigError(
                "model.hf_assets_path",
                path,
                "must be a folder with tokenizer.json, not a file. Convert the tokenizer with "
                "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER). Or "
                "download one with `tst assets`",
            )
        super()._validate_config()
