"""Another sequence length in the middle of a run, the data position carried across.

Upstream's text pipeline: documents -> tokens (BOS, EOS) -> one token buffer per data-parallel
rank -> windows of seq_len + 1 tokens -> batches. Its resume state is the buffer and the position
in the documents, neither of which depends on the sequence length: the next window starts at the
next token whatever its length.

No worker processes where the position is carried across (``job_checks`` refuses them): with
torchtitan 0.2.2 and torchdata 0.11, a worker's state holds the token buffer itself, not a copy, and
is pickled in the background while the worker reads on. It can then hold tokens of documents that it
does not count as read, and they come again after the state is loaded.
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
    if dataloader._iterator is None:
        # Not begun; a state to resume from may be waiting. To ask for the state now would lose that
        # one, as a streaming dataset takes it on only when it iterates.
        dataset.seq_len = seq_len
        return
    state = dataloader.state_dict()
    dataset.seq_len = seq_len
    dataloader.load_state_dict(state)


def check_workers(dataloader: StatefulDataLoader) -> None:
    """Refuse worker processes that would each read the whole of upstream's text dataset.

    Only a streaming dataset is split over its workers; of a map-style one, n workers give every
    window n times (torchtitan 0.2.2).

    Raises:
        ValueError: naming the number of workers and the limit.
    """
    dataset, workers = dataloader.dataset, dataloader.num_workers
    map_style = isinstance(dataset, HuggingFaceTextDataset) and isinstance(dataset._data, Dataset)
    if map_style and workers > 1:
        raise ValueError(
            f"training.dataloader.num_workers = {workers}: must be at most 1, as each worker would "
            "read the whole of a dataset that is not streaming"
        )
