"""The state of autograd, which torch has no public name for. It needs torch only."""

import torch


def in_backward() -> bool:
    """Return whether autograd runs backward, which includes recomputing a checkpointed layer."""
    return torch._C._current_graph_task_id() != -1
