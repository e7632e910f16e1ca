"""Another sequence length in the middle of a run, the data position carried across.

Upstream's text pipeline: documents -> tokens (BOS, EOS) -> one token buffer per data-parallel
rank -> windows of seq_len + 1 tokens -> batches. Its resume state is the buffer and the position
in the documents, neither of which depends on the sequence length: the next window starts at the
next token whatever its length.
"""

from datasets import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset


def set_seq_len(dataloader: StatefulDataLoader, seq_len: int) -> None:
    """Let the next batch have sequences of ``seq_len`` data tokens.

    Goes through the loader's own state, as a resume does, so that no token is lost or repeated.
    Takes effect at the next ``iter(dataloader)``.

    Raises:
        TypeError: if the loader's dataset has no ``seq_len``.
    """
    dataset = dataloader.dataset
    if not hasattr(dataset, "seq_len"):
        raise TypeError(
            f"{type(dataset).__name__} has no seq_len: superposition needs a dataset whose "
            "sequence length can be set"
        )
    if dataset.seq_len == seq_len:
        return
    state = dataloader.state_dict()
    dataset.seq_len = seq_len
    dataloader.load_state_dict(state)


def check_workers(dataloader: StatefulDataLoader, key: str) -> None:
    """Refuse worker processes that would repeat data.

    Each worker of upstream's text dataset reads a whole copy of a map-style (not streaming)
    dataset, so that n workers give every window n times. A streaming dataset is split by its
    shards; a worker beyond their number loops for ever without data.

    Raises:
        ValueError: naming ``key`` (the config section), the number of workers and the limit.
    """
    dataset, workers = dataloader.dataset, dataloader.num_workers
    if workers <= 1 or not isinstance(dataset, HuggingFaceTextDataset):
        return
    streaming = not isinstance(dataset._data, Dataset)
    limit = dataset._data.num_shards if streaming else 1
    if workers > limit:
        why = f"has {limit} shards on this rank" if streaming else "would be read whole by each"
        raise ValueError(
            f"{key}.dataloader.num_workers = {workers}: must be at most {limit}, as the dataset {why}"
        )
