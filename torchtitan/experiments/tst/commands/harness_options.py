"""Options of the LM-Eval harness, which several commands have."""

import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from ..errors import ArgumentError
from ..resilience.stop import STOP_SIGNALS, STOPPED_EXIT_CODE
from .arguments import check_positive, log_progress

if TYPE_CHECKING:
    from ..results.harness import Harness  # needs the extra "eval"


@dataclass(frozen=True)
class HarnessOptions:
    """Options of the LM-Eval harness."""

    tasks: str | None = None
    """Tasks of the harness, separated by commas. By default those of the paper."""
    include_path: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Folder with more tasks, in the YAML of the harness."""
    task_data: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Folder with the data of the tasks, for a machine without a network."""
    batch_size: str = "auto"
    """Sequences in a batch."""
    limit: Annotated[int | None, arg(metavar="N")] = None
    """Number of documents of each task, for a quick test."""
    device: str | None = None
    """Device of the model. By default the accelerator, or cpu."""

    def check_only_with(self, option: str, is_given: bool) -> None:
        """Check that none of these options is given without the option that uses them.

        Raises:
            ArgumentError: if one is given without it; names the options.
        """
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if given and not is_given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ArgumentError(f"{names}: works only with {option}. Add {option}")

    def chosen(self, default: Iterable[str]) -> list[str]:
        """Return the names of the tasks; ``default`` without --tasks."""
        return list(dict.fromkeys(self.tasks.split(",") if self.tasks else default))

    def build(self, tasks: list[str]) -> "Harness":
        """Return the harness with these settings, and prepare the process to run it.

        Log lines are shown. A stop signal exits as Ctrl-C does, so that temporary files are
        removed.

        Args:
            tasks: names of the tasks, as :meth:`chosen` returns them.

        Raises:
            ArgumentError: for a limit below 1.
        """
        check_positive(limit=self.limit)
        from ..results.harness import Harness

        log_progress()
        for number in STOP_SIGNALS:
            signal.signal(number, _stop)
        return Harness(
            tasks, self.include_path, self.batch_size, self.limit, self.device, self.task_data
        )


def _stop(*_: object) -> None:
    """Exit so that temporary files are removed, and ignore further signals meanwhile."""
    for number in STOP_SIGNALS:  # Slurm signals every process, and its batch script does it again
        signal.signal(number, signal.SIG_IGN)
    sys.exit(STOPPED_EXIT_CODE)
