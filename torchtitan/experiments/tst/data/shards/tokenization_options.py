"""The options of a tokenization, without the packages that it needs."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Options:
    """How to tokenize: the shards depend on these options and the text."""

    tokenizer: str
    """Folder of a Hugging Face tokenizer, the same as model.hf_assets_path of the runs."""

    text_key: str = "text"
    """Field of a record that holds the text."""

    hub_config: str | None = None
    """For a dataset on the hub: its configuration, such as en."""

    hub_split: str = "train"
    """For a dataset on the hub: its split."""

    shuffle: Literal["none", "documents", "chunks"] = "documents"
    """
    Order of the tokens in a shard:
    - none: the order of the source.
    - documents: documents in random order.
    - chunks: documents in random order, cut into chunks of
      `chunk_tokens`, and the chunks in random order.
    Use chunks for small runs, so that no long document
    fills a batch.
    """

    chunk_tokens: int = 8192
    """Tokens of a chunk. An incomplete chunk at the end of a task is dropped."""

    merge: bool = False
    """
    Merge the shards of all tasks into one random order.
    A single process writes all tokens once more.
    Use it if the files differ, such as one file for each
    crawl, because shards are read in order.
    """

    seed: int = 0
    """Seed of the random orders."""

    tasks: int | None = None
    """Number of tasks. By default one for each input file, and one for a dataset on the hub."""

    shard_tokens: int | None = None
    """Start a new shard after this many tokens, when shuffling or merging. By default never."""


@dataclass
class Machine:
    """Where to tokenize; this does not change the shards."""

    executor: Literal["local", "slurm", "ray"] = "local"
    """'local': this machine. 'slurm': submit job arrays from here. 'ray': a running Ray cluster."""

    workers: int | None = None
    """Tasks that run at the same time. By default one per core on this machine, else no limit."""

    partition: str | None = None
    """Slurm: partition of the jobs."""

    time: str = "24:00:00"
    """Slurm: time limit of a task."""

    qos: str | None = None
    """Slurm: quality of service."""

    sbatch: dict[str, str] = field(default_factory=dict)
    """Slurm: further options of sbatch, such as account NAME."""

    cpus_per_task: int = 1
    """Slurm and Ray: CPU cores of a task."""

    gigabytes_per_cpu: int = 4
    """Slurm and Ray: memory of a task per CPU core, in GB."""
