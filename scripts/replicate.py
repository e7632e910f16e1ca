"""The runs of docs/results.md, and its figures: TST against its baseline at small scale.

    python scripts/replicate.py

Sweeps over train_configs/replication.toml in outputs/replication, two runs at a time on one CPU
thread each; stopped and started again, it goes on.
"""

import argparse
import os
from pathlib import Path

import sweep

BASE = "train_configs/replication.toml"
SEEDS = {"debug.seed": ["0", "1", "2"]}
BAG_SIZE, STEP_RATIO = sweep.BAG_SIZE, sweep.STEP_RATIO
# name of each sweep: what is varied, further arguments
SWEEPS: dict[str, tuple[dict[str, list[str]], list[str]]] = {
    "bag_size": ({BAG_SIZE: ["1", "2", "4", "8", "16"], **SEEDS}, []),
    "mode": ({"superposition.mode": ["input", "output"], **SEEDS}, []),
    "reinit": (SEEDS, ["--superposition.reinit_at_recovery=tok_embeddings,output"]),
    "steps": ({"training.steps": ["1200", "4800", "9600"], BAG_SIZE: ["1", "4"]}, []),
    "step_ratio": (
        {BAG_SIZE: ["2", "4", "8", "16"], STEP_RATIO: ["0.1", "0.2", "0.4", "0.6"]},
        [],
    ),
    "lr": ({"optimizer.lr": ["1.5e-3", "6e-3"], BAG_SIZE: ["1", "4"]}, []),
}


def run(folder: Path, jobs: int) -> None:
    """All runs that are not finished."""
    os.environ |= {"NGPU": "1", "OMP_NUM_THREADS": "1"}
    for name, (vary, arguments) in SWEEPS.items():
        print(f"Sweep {name}", flush=True)
        sweep.make(folder / name, BASE, vary, arguments)
        sweep.run(folder / name, jobs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default="outputs/replication", help="of the sweeps")
    parser.add_argument("--jobs", type=sweep.positive, default=2, help="runs at a time")
    args = parser.parse_args()
    run(args.folder, args.jobs)


if __name__ == "__main__":
    main()
