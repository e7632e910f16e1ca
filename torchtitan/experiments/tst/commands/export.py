"""Export a checkpoint's model as a Hugging Face folder, as transformers loads it.

    tst export outputs/demo/tst outputs/demo/hf
    tst export RUN/checkpoint/boundary FOLDER --checkpoint.export_dtype=bfloat16

The run's config.toml says what model it is. Further arguments are the job's, such as
--model.hf_assets_path for a tokenizer that has moved; a checkpoint of TorchTitan's own trainer
needs its --job.config_file.
"""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..resilience.checkpoint.inventory import find_checkpoint
from ..results.export import export, read_job
from .arguments import log_progress


def main(
    overrides: list[str],
    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")],
    output: Annotated[Positional[Path], arg(metavar="FOLDER")],
    /,
) -> None:
    """Export a checkpoint.

    Args:
        overrides: the job's arguments.
        checkpoint: RUN/checkpoint/step-N or boundary; of a run folder, the last.
        output: Folder to make.
    """
    log_progress()
    found = find_checkpoint(checkpoint)
    export(found, output, read_job(found, overrides))
