"""The sweeps of docs/results.md: over one job and, on a GPU, over a larger one."""

import json
from dataclasses import dataclass
from pathlib import Path

from torchtitan.experiments.tst.data.demo_corpus import TOKENS
from torchtitan.experiments.tst.data.shards.token_shards import CORPUS_FILE
from torchtitan.experiments.tst.planning.sweep import BAG_SIZE, STEP_RATIO

BASE, GPU_BASE = "train_configs/replication.toml", "train_configs/replication_gpu.toml"
SEED, LR, STEPS = "debug.seed", "optimizer.lr", "training.steps"
_MODE, _REINIT = "superposition.mode", "superposition.reinit_at_recovery"


@dataclass(frozen=True)
class Corpus:
    """A folder of train.jsonl, validation.jsonl, tokenizer/ and tokens/.

    Attributes:
        folder: its path.
        made_by: the command that makes it; None for the demo's corpus, which its runs make.
    """

    folder: str
    made_by: str | None = None

    @property
    def arguments(self) -> list[str]:
        """The arguments of a job that reads it."""
        return [
            f"--model.hf_assets_path=./{self.folder}/tokenizer",
            f"--training.dataset_path=./{self.folder}/{TOKENS}",
            f"--validation.dataset_path=./{self.folder}/validation.jsonl",
        ]

    @property
    def id(self) -> str:
        """Checksum of its tokenizer, and its number of tokens; empty until it is complete."""
        path = Path(self.folder, TOKENS, CORPUS_FILE)
        if not path.exists():
            return ""
        tokens = json.loads(path.read_text())
        if not tokens["complete"]:
            return ""
        checksum = tokens["settings"]["tokenizer"].rpartition(" ")[2].rstrip(")")
        return f"{checksum}-{tokens['tokens']}"


_MAKE = "python scripts/make_corpus.py"
_PROSE, _PACKAGES = "outputs/replication/prose", "outputs/replication/packages"
CORPORA = {
    "program": Corpus("outputs/demo/corpus"),
    "prose": Corpus(_PROSE, f"{_MAKE} rfc {_PROSE} --source FOLDER_OF_RFCS"),
    "packages": Corpus(_PACKAGES, f"{_MAKE} python {_PACKAGES} --vocab-size 4096"),
}


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in some values.

    Attributes:
        name: name of its folder.
        vary: values of each varied key; every combination is a run.
        arguments: further arguments of all runs.
        corpora: names of the corpora; the sweep is made on each.
        base: the job.
    """

    name: str
    vary: dict[str, list[str]]
    arguments: tuple[str, ...] = ()
    corpora: tuple[str, ...] = ("program",)
    base: str = BASE

    def folder(self, corpus: str) -> str:
        """Return the folder of its runs on a corpus, below the folder of all sweeps."""
        return f"{self.name}/{corpus}"


_SIZES, _RATIOS = ["4", "2", "8"], ["0.45", "0.6", "0.3"]
_LISTS = ["[8,4,2]", "[4,2]", "[16,8,4]", "[16,8,4,2]"]
SEARCH_SEED, FRESH_SEEDS = 0, (1, 2, 3)
_FRESH = {SEED: [str(seed) for seed in FRESH_SEEDS]}
_AT_03 = f"--{STEP_RATIO}=0.3"
# The first 44 runs of docs/results.md: 0.09M parameters, peak learning rate not tuned
_SMALL = (
    "--model.flavor=demo_small",
    f"--{STEPS}=2400",
    f"--{LR}=3e-3",
    "--validation.freq=200",
    "--compile.no-enable",
)
_SMALL_TST = (*_SMALL, f"--{BAG_SIZE}=4", _AT_03)
_SEEDS = {SEED: ["0", "1", "2"]}

SWEEPS = [
    # the peak learning rate
    Sweep("lr", {LR: ["3e-3", "6e-3", "1.2e-2", "2.4e-2"], BAG_SIZE: ["1", "4"]}, (_AT_03,)),
    # the search: one seed, one corpus
    Sweep("recipe", {STEP_RATIO: _RATIOS, BAG_SIZE: _SIZES}),
    Sweep("stages", {STEP_RATIO: _RATIOS, BAG_SIZE: _LISTS}),
    Sweep("reverse", {STEP_RATIO: ["0.45"], BAG_SIZE: ["[2,4,8]"]}),
    # the test: three other seeds, two corpora
    Sweep(
        "test",
        {**_FRESH, BAG_SIZE: ["1", "4", "[8,4,2]"]},
        (_AT_03,),
        ("program", "prose"),
    ),
    Sweep("sizes", {**_FRESH, BAG_SIZE: ["2", "8"]}, (_AT_03,), ("program", "prose")),
    Sweep(
        "later",
        {**_FRESH, BAG_SIZE: ["4", "[8,4,2]"]},
        (f"--{STEP_RATIO}=0.45",),
        ("program", "prose"),
    ),
    Sweep("longer", {SEED: ["1"], BAG_SIZE: ["1", "4", "[8,4,2]"]}, (_AT_03, f"--{STEPS}=6000")),
    Sweep("longer_baseline", {SEED: ["2", "3"]}, (f"--{BAG_SIZE}=1", f"--{STEPS}=6000")),
    Sweep(
        "longer_lr",
        {LR: ["6e-3"], BAG_SIZE: ["1", "4"]},
        (_AT_03, f"--{STEPS}=6000", f"--{SEED}=1"),
    ),
    Sweep(
        "lr_prose",
        {LR: ["6e-3", "2.4e-2"], BAG_SIZE: ["1", "4"]},
        (_AT_03, f"--{SEED}=1"),
        ("prose",),
    ),
    Sweep(
        "unequal",
        {STEP_RATIO: ["[0.125,0.125,0.05]", "[0.075,0.075,0.15]"], BAG_SIZE: ["[8,4,2]"]},
    ),
    Sweep("from_32", {STEP_RATIO: ["0.3"], BAG_SIZE: ["[32,16,8,4,2]"]}),
    # a larger model, on a GPU
    Sweep("gpu", {BAG_SIZE: ["1", "4", "8"], **_SEEDS}, (_AT_03,), ("packages",), GPU_BASE),
    # the first runs
    Sweep("small_bag_size", {BAG_SIZE: ["1", "2", "4", "8", "16"], **_SEEDS}, (*_SMALL, _AT_03)),
    Sweep("small_mode", {_MODE: ["input", "output"], **_SEEDS}, _SMALL_TST),
    Sweep("small_reinit", _SEEDS, (*_SMALL_TST, f"--{_REINIT}=tok_embeddings,output")),
    Sweep("small_steps", {STEPS: ["1200", "4800"], BAG_SIZE: ["1", "4"]}, (*_SMALL, _AT_03)),
    Sweep(
        "small_step_ratio",
        {BAG_SIZE: ["2", "4", "8", "16"], STEP_RATIO: ["0.1", "0.2", "0.4", "0.6"]},
        _SMALL,
    ),
]
