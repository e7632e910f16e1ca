"""Which loader a job gets."""

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
    """A ``TrainSpec.build_dataloader_fn`` in the place of upstream's for text.

    More than one worker process for text is upstream's own loader, which shares the data out to its
    workers. The checks of a job's data allow it without superposition only.
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
    """In the place of upstream's ``build_text_validation_dataloader``."""
    if is_token_shards(job_config.validation):
        return ShardsValidationDataloader(dp_world_size, dp_rank, tokenizer, job_config, infinite)
    return TextLoader("validation", dp_world_size, dp_rank, tokenizer, job_config, infinite)


def announce_text(section: Section, loader: BaseDataLoader) -> None:
    """Log how many files a section's text dataset is, and warn of those that are not read."""
    files = None
    if isinstance(loader, StreamsDataloader):
        files = loader.files
    elif isinstance(loader, TextLoader):
        files = loader.dataset.files
    if files:
        logger.info(f"Data: {section} reads {files}")
        if warning := files.warning():
            logger.warning(f"Data: {section} does not read everything: {warning}")


def check_workers(dataloader: StatefulDataLoader) -> None:
    """Refuse worker processes that would each read the whole of upstream's text dataset.

    Only a streaming dataset is split over its workers; of a map-style one, n workers give every
    window n times (torchtitan 0.2.2).

    Raises:
        ValueError: naming the number of workers and the limit.
    """
    dataset, workers = dataloader.dataset, dataloader.num_workers
    map_style = isinstance(dataset, HuggingFaceTextDataset) and isinstance(
        data_of(dataset), Dataset
    )
    if map_style and workers > 1:
        raise ValueError(
            f"training.dataloader.num_workers = {workers}: must be at most 1, as each worker would "
            "read the whole of a dataset that is not streaming"
        )
