"""A run's children of each kind, and a stop signal to all of them; run by test_stop.py.

They must do what the run still needs of them, and it must end as soon as it would without signals.
"""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch._inductor.async_compile import AsyncCompile
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.utils.data import DataLoader

from torchtitan.experiments.tst.resilience.stop import STOP_SIGNALS, StopRequest
from torchtitan.experiments.tst.testing.processes import descendants


def names(pids):
    return {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids}


def blocks_or_ignores(pid, number):
    """Whether a signal to a process has no effect: at once, or ever."""
    status = Path(f"/proc/{pid}/status").read_text()
    masks = (status.partition(f"{name}:")[2].split()[0] for name in ("SigBlk", "SigIgn"))
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def main(folder):
    request = StopRequest()
    request.listen()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def save(step):
        """In a process of its own."""
        dcp.async_save(
            {"value": torch.ones(8)},
            checkpoint_id=folder / f"step-{step}",
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        ).result()

    save(1)
    batches = iter(DataLoader(range(100), num_workers=1))
    assert next(batches) == 0
    compile_pool = AsyncCompile.process_pool()  # which compiles Triton kernels
    assert compile_pool.submit(abs, -1).result() == 1

    before = names(descendants(os.getpid()))
    print(*before.values(), sep="\n")
    kinds = ("resource_tracker", "multiprocessing.spawn", "compile_worker", Path(__file__).name)
    for kind in kinds:
        assert any(kind in name for name in before.values()), f"no {kind}"
    for number in STOP_SIGNALS:
        for pid, name in before.items():
            assert blocks_or_ignores(pid, number), name
            os.kill(pid, number)
    assert names(descendants(os.getpid())) == before
    save(2)
    assert [int(batch) for batch in batches] == list(range(1, 100))
    assert compile_pool.submit(abs, -2).result() == 2

    with multiprocessing.Pool(2) as pool:  # ends them by terminate()
        assert pool.map(abs, [-1, -2]) == [1, 2]

    assert not request.signal
    os.kill(os.getpid(), signal.SIGTERM)
    while not request.signal:  # another thread receives it
        time.sleep(0.01)
    assert request.signal == signal.SIGTERM
    request.close()
    leftover = DataLoader(range(100), num_workers=1)
    main.kept = iter(leftover)  # a worker that nobody ends
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    print("done", flush=True)
