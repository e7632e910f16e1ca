"""Keys that name modules of the model."""

import pytest

from torchtitan.experiments.tst.checks.job import check_config
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.errors import ConfigError

LAYERS = [f"layers.{number}" for number in range(6)]  # of the flavor debugmodel
STAGES = [["tok_embeddings", *LAYERS[:3]], [*LAYERS[3:], "norm", "output"]]
QWEN3 = ["--model.name=qwen3", "--model.flavor=debugmodel_moe_tiny"]


def check(*args, stages=None, names=None, ranks=1):
    config = SuperpositionConfigManager().parse_args(["--model.flavor=debugmodel", *args])
    config.parallelism.module_fqns_per_model_part = stages
    if names is not None:
        config.activation_checkpoint.mode = "selective"
        config.activation_checkpoint.selective_ac_option = "op"
        config.activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns = names
    check_config(config, ranks)


def test_stages_by_hand_hold_each_module_once():
    check("--parallelism.pipeline_parallel_degree=2", stages=STAGES, ranks=2)


@pytest.mark.parametrize(
    ("stages", "what"),
    [
        ([["tok_embeddings", *LAYERS[:3]], [*LAYERS[4:], "norm", "output"]], "not name layers.3;"),
        ([[*STAGES[0], "layer.9"], STAGES[1]], "names modules that do not exist: layer.9;"),
        ([[*STAGES[0], "layers.3"], STAGES[1]], "names more than once: layers.3;"),
    ],
)
def test_a_layer_that_is_in_no_stage_or_in_two(stages, what):
    with pytest.raises(ConfigError, match=what) as error:
        check("--parallelism.pipeline_parallel_degree=2", stages=stages, ranks=2)
    assert str(error.value).startswith("parallelism.module_fqns_per_model_part = [[")
    check(stages=stages)  # without a pipeline nobody reads them


def test_modules_to_recompute_are_linear():
    check(names=["attention.wq", "output"])
    check(*QWEN3, names=["moe.router.gate"])
    with pytest.raises(ConfigError, match=r"'attention' matches layers\.0\.attention, which is n"):
        check(names=["attention"])
    with pytest.raises(ConfigError, match=r"'attention\.wx' matches none"):
        check(names=["output", "attention.wx"])
