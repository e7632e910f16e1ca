"""A rank of a small job on token shards, for test_layouts_of_03.py: ``FOLDER OPTIONS``.

It trains the job that the JSON in OPTIONS describes, and rank 0 of the last pipeline stage writes
losses and gradient norms to ``FOLDER/losses.json``. With "seed", it only writes the first weights.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from torchtitan.experiments.tst.titan03.cpu import enable_cpu_if_alone

enable_cpu_if_alone()
torch.set_num_threads(1)

from jobs_of_03 import L, Recorder, ordinary, saving, tst  # noqa: E402
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss  # noqa: E402

from torchtitan.experiments.tst.config.sections import LoadBalance  # noqa: E402
from torchtitan.experiments.tst.titan03.models import model_spec  # noqa: E402
from torchtitan.experiments.tst.titan03.shards import ShardsDataLoader  # noqa: E402

SEQUENCES = 4  # of a step, on all ranks


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    corpus, layout = Path(options["corpus"]), options["layout"]
    not_data = ("tensor", "context", "pipeline")
    copies = [layout.get(f"{name}_parallel_degree", 1) for name in not_data]
    ranks = int(os.environ["WORLD_SIZE"])
    for copy in copies:
        ranks //= copy
    config = ordinary(folder, corpus, local_batch_size=SEQUENCES // ranks, disable_cuda_graphs=True)
    config.model_spec = model_spec(*options["model"], seq_len=L)
    config.loss = CrossEntropyLoss.Config(global_vocab_size=config.model_spec.model.vocab_size)
    if options["chunks"] > 1:
        config.loss = ChunkedLossWrapper.Config(num_chunks=options["chunks"], loss_fn=config.loss)
    config.dataloader = ShardsDataLoader.Config(paths=[str(corpus / "tokens")])
    layout |= {} if torch.__version__ >= "2.14" else {"spmd_backend": "partial_dtensor"}
    config.parallelism = dataclasses.replace(
        config.parallelism, pipeline_parallel_schedule="1F1B", **layout
    )
    seed = options.get("seed")
    config.checkpoint = saving(100, create_seed_checkpoint=bool(seed))
    if not seed:
        config.checkpoint.initial_load_path = options["weights"]
    balance = LoadBalance(*options.get("balance", ()))
    trainer = tst(config, load_balance=balance).build()
    if seed:
        trainer.checkpointer.save(curr_step=0, last_step=True)
        return
    time.sleep = lambda seconds: None
    recorder = Recorder(trainer)
    trainer.train()
    if dist.get_rank() == (1 if copies[-1] > 1 else 0):
        lines = [list(recorder.losses.values()), list(recorder.norms.values())]
        (folder / "losses.json").write_text(json.dumps(lines))
    trainer.close()


if __name__ == "__main__":
    main()
