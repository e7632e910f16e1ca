"""How to tokenize a corpus, and where; known without the packages that do it."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Options:
    """How to tokenize: what the shards depend on, beside the text."""

    tokenizer: str
    """Folder of a Hugging Face tokenizer: what model.hf_assets_path of the runs will be."""

    text_key: str = "text"
    """Field of a record that holds the text."""

    hub_config: str | None = None
    """Of a dataset on the hub: its configuration, such as en."""

    hub_split: str = "train"
    """Of a dataset on the hub: its split."""

    shuffle: Literal["none", "documents", "chunks"] = "documents"
    """
    Order of the tokens in a shard: 'none', as they come; 'documents' in random order; 'chunks':
    documents in random order, cut into chunks of `chunk_tokens`, these in random order. A small run
    is hurt if one long document fills a batch, which 'chunks' prevents.
    """

    chunk_tokens: int = 8192
    """Tokens of a chunk. What is left over at the end of a task is dropped."""

    merge: bool = False
    """
    Merge the shards of all tasks into one random order, in a single process that writes all tokens
    once more. For a corpus whose files differ, such as one file a crawl: shards are read in order.
    """

    seed: int = 0
    """Of the random orders."""

    tasks: int | None = None
    """Parts of the work. By default one for each input file, and one for a dataset on the hub."""

    shard_tokens: int | None = None
    """Begin another shard after that many tokens, when shuffling or merging. By default never."""


@dataclass
class Machine:
    """Where the work is done, which does not change the shards."""

    executor: Literal["local", "slurm", "ray"] = "local"
    """This machine; job arrays that are submitted from here; a Ray cluster that is running."""

    workers: int | None = None
    """Tasks at the same time. By default, locally as many as there are cores, else no limit."""

    partition: str | None = None
    """Slurm: where the jobs run."""

    time: str = "24:00:00"
    """Slurm: the limit of a task."""

    qos: str | None = None
    """Slurm: quality of service."""

    sbatch: dict[str, str] = field(default_factory=dict)
    """Slurm: further options, such as account NAME."""

    cpus_per_task: int = 1
    """Slurm and Ray."""

    gigabytes_per_cpu: int = 4
    """Slurm and Ray: memory."""
