"""Run TorchTitan 0.3 without an accelerator: what it needs on CPU besides :mod:`..upstream.on_cpu`.

Its own entry points run there with
``python -m torchtitan.experiments.tst.titan03.cpu torchtitan.train --module ... --config ...``.
"""

import functools
import runpy
import sys
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn.attention.flex_attention import create_block_mask
from torchtitan.models.common import attention

from ..upstream.on_cpu import complete_torch_if_alone, masked_attention
from ..upstream.replaced import replace


def enable_cpu_if_alone() -> bool:
    """Make TorchTitan 0.3 run on CPU if there is no accelerator. Return whether it did.

    Flex attention, which all its language models use, becomes attention with a dense mask: on CPU,
    flex attention has no backward. Call it before a trainer is built.
    """
    if not complete_torch_if_alone():
        return False

    def flex_attention(q: Any, k: Any, v: Any, *, block_mask: Any, **options: Any) -> Any:
        if options.pop("return_aux").lse or options.pop("score_mod"):
            raise NotImplementedError("flex attention has neither log-sums nor scores on CPU")
        del options["kernel_options"]
        return masked_attention(q, k, v, block_mask, **options), None

    replace(attention.FlexAttention, "_compiled_flex_attn", staticmethod(flex_attention))
    on_cpu = functools.partial(create_block_mask, device="cpu")
    replace(attention, "_compiled_create_block_mask", on_cpu)
    if not hasattr(dist, "set_timeout"):  # torch 2.13, which has builds without CUDA
        dist.set_timeout = _set_pg_timeout  # type: ignore[attr-defined]
    return True


def main() -> None:
    """Run the module that the first argument names, as ``python -m`` would."""
    enable_cpu_if_alone()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
