"""Choose the loader of a job."""

from datasets import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset
from torchtitan.tools.logging import logger

from ..upstream.names import data_of
from .loader import Section
from .shards.loader import ShardsDataloader, ShardsValidationDataloader, is_token_shards
from .text.dataset import TextLoader
from .text.streams import StreamsDataloader


def build_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = True,
) -> BaseDataLoader:
    """Build the loader of training data: the train spec's function instead of upstream's.

    With more than one worker process for text, it is upstream's own loader, which splits the data
    over its workers. The checks of a job allow this without superposition only.

    Args:
        dp_world_size: number of data-parallel ranks.
        dp_rank: data-parallel rank of this process.
        tokenizer: tokenizer of the run.
        job_config: config of the run.
        infinite: restart upstream's loader at the end of the data.
    """
    if is_token_shards(job_config.training):
        return ShardsDataloader(dp_world_size, dp_rank, tokenizer, job_config)
    if job_config.training.dataloader.num_workers > 1:
        loader = TextLoader("training", dp_world_size, dp_rank, tokenizer, job_config, infinite)
        check_workers(loader)
        return loader
    return StreamsDataloader(dp_world_size, dp_rank, tokenizer, job_config)


def build_validation_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = False,
) -> BaseDataLoader:
    """Build the loader of validation data, instead of ``build_text_validation_dataloader``.

    The arguments are those of :func:`build_dataloader`.
    """
    if is_token_shards(job_config.validation):
        return ShardsValidationDataloader(dp_world_size, dp_rank, tokenizer, job_config, infinite)
    return TextLoader("validation", dp_world_size, dp_rank, tokenizer, job_config, infinite)


def announce_text(section: Section, loader: BaseDataLoader) -> None:
    """Log how many files of text a section reads, and warn about files that it skips."""
    files = None
    if isinstance(loader, StreamsDataloader):
        files = loader.files
    elif isinstance(loader, TextLoader):
        files = loader.dataset.files
    if files:
        logger.info(f"Data: {section} reads {files}")
        if warning := files.warning():
            logger.warning(f"Data: {section} does not read all files: {warning}")


def check_workers(dataloader: StatefulDataLoader) -> None:
    """Check that worker processes do not each read the whole of upstream's text dataset.

    Upstream splits only a streaming dataset over its workers. With n workers, a map-style dataset
    yields every window n times (torchtitan 0.2.2).

    Raises:
        ValueError: if there is more than one worker for a map-style dataset.
    """
    dataset, workers = dataloader.dataset, dataloader.num_workers
    map_style = isinstance(dataset, HuggingFaceTextDataset) and isinstance(
        data_of(dataset), Dataset
    )
    if map_style and workers > 1:
        raise ValueError(
            f"training.dataloader.num_workers = {workers}: must be at most 1, because each worker "
            "would read all of a dataset that is not streaming"
        )
