"""Run TorchTitan 0.2.2 without an accelerator: all patches that it needs on CPU.

Importing this module does nothing. :func:`enable_cpu_if_alone` patches torch and torchtitan, only
on a machine without an accelerator. Upstream's own entry points run on such a machine with
``python -m torchtitan.experiments.tst.upstream.cpu torchtitan.train ...``.
"""

import functools
import runpy
import sys

from torch.nn.attention.flex_attention import create_block_mask
from torchtitan.config import ConfigManager
from torchtitan.models import attention
from torchtitan.models.moe import utils as moe_utils

from .on_cpu import complete_torch_if_alone, masked_attention
from .replaced import replace


def enable_cpu_if_alone() -> bool:
    """Make torchtitan run on CPU if there is no accelerator. Return whether it did.

    Call it before a trainer is built. Modules that are already imported are patched too.
    """
    if not complete_torch_if_alone():
        return False
    _make_expert_permutation_run_on_cpu()
    _make_flex_attention_train_on_cpu()
    return True


def _make_expert_permutation_run_on_cpu() -> None:
    """Use upstream's CPU version of the permutation; upstream itself always uses Triton's."""
    on_cpu = functools.partial(moe_utils.generate_permute_indices, use_cpu=True)
    replace(moe_utils, "generate_permute_indices", on_cpu)


def _make_flex_attention_train_on_cpu() -> None:
    def flex_attention(q, k, v, *, block_mask, scale, enable_gqa, return_lse):
        if return_lse:
            raise NotImplementedError("flex attention does not return log-sums on CPU")
        return masked_attention(q, k, v, block_mask, scale=scale, enable_gqa=enable_gqa)

    wrapper = attention.FlexAttentionWrapper
    replace(wrapper, "_compiled_flex_attn", staticmethod(flex_attention))
    on_cpu = functools.partial(create_block_mask, device="cpu")
    replace(attention, "_compiled_create_block_mask", on_cpu)


def main() -> None:
    """Run the module that the first argument names, as ``python -m`` would."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m torchtitan.experiments.tst.upstream.cpu MODULE [ARGUMENTS]")
    enable_cpu_if_alone()
    sys.argv = sys.argv[1:]
    # its default arguments are the command line at the time of import
    replace(ConfigManager.parse_args, "__defaults__", (sys.argv[1:],))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
