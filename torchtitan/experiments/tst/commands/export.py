"""Export the model of a checkpoint as a Hugging Face folder, for transformers.

    tst export outputs/demo/tst outputs/demo/hf
    tst export RUN/checkpoint/boundary FOLDER --checkpoint.export_dtype=bfloat16

The run's config.toml names the model. Further arguments override it, such as --model.hf_assets_path
if the tokenizer has moved. A checkpoint of TorchTitan's own trainer needs --job.config_file, the
TOML of its job.
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
        overrides: Arguments of the job.
        checkpoint: RUN/checkpoint/step-N, RUN/checkpoint/boundary, or RUN for its last checkpoint.
        output: Folder to create.
    """
    log_progress()
    found = find_checkpoint(checkpoint)
    export(found, output, read_job(found, overrides))
