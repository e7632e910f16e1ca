"""Export a checkpoint's model as a Hugging Face folder, for transformers and all that builds on it.

    python scripts/export_model.py outputs/demo/tst outputs/demo/tst/hf
    python scripts/export_model.py RUN/checkpoint/boundary FOLDER --checkpoint.export_dtype=bfloat16

The run's config.toml says what model it is. Further arguments are the job's, such as
--model.hf_assets_path for a tokenizer that has moved; a checkpoint of TorchTitan's own trainer
needs its --job.config_file.
"""

import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtitan.tools.logging import init_logger

from command_line import documented_parser
from torchtitan.experiments.tst.checkpoint.files import CheckpointError
from torchtitan.experiments.tst.checkpoint.inventory import find_checkpoint
from torchtitan.experiments.tst.data.tokenizer import TokenizerError, open_tokenizer
from torchtitan.experiments.tst.export import ExportError, export, read_job


def start_logging() -> None:
    """Upstream's log lines on the console, without those of the hub's library."""
    init_logger()
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)


@contextmanager
def exported(model: Path, job_args: list[str]) -> Iterator[Path]:
    """An exported folder: ``model`` itself, or a temporary one (TMPDIR) if it is a checkpoint."""
    if (model / "config.json").is_file():
        if job_args:
            raise ValueError(f"{model} is exported already: {' '.join(job_args)} has no meaning")
        try:
            open_tokenizer(model)  # transformers names no file
        except TokenizerError as error:
            raise ValueError(f"{model}: {error}") from error
        yield model
        return
    checkpoint = find_checkpoint(model)
    job_config = read_job(checkpoint, job_args)
    with tempfile.TemporaryDirectory(prefix="export-") as folder:
        output = Path(folder, checkpoint.name)
        export(checkpoint, output, job_config)
        yield output


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="RUN/checkpoint/step-N or boundary; of a run folder, the last"
    )
    parser.add_argument("output", type=Path, help="folder to make")
    args, job_args = parser.parse_known_args()
    start_logging()
    try:
        checkpoint = find_checkpoint(args.checkpoint)
        job_config = read_job(checkpoint, job_args)
        export(checkpoint, args.output, job_config)
    except (CheckpointError, ExportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
