"""Launches of ours against launches of upstream's own ``torchtitan.train``, bit for bit."""

import shutil

import pytest

import launches
from jobs import TST, UPSTREAM, saving, superposition, tensorboard_scalars

KEYS = ("loss_metrics/global_avg_loss", "loss_metrics/global_max_loss", "grad_norm")
MODELS = {
    "llama3": ("--model.name=llama3", "--model.flavor=debugmodel"),
    "qwen3": ("--model.name=qwen3", "--model.flavor=debugmodel_tiny"),
    "qwen3 tied": ("--model.name=qwen3", "--model.flavor=tiny_tied"),
    "qwen3 MoE": ("--model.name=qwen3", "--model.flavor=debugmodel_moe_tiny"),
}
LOG = ("--metrics.enable_tensorboard",)
STEPS = 8


def same_scalars(a, b, first_step=1):
    a, b = tensorboard_scalars(a), tensorboard_scalars(b)
    for key in KEYS:
        assert len(b[key]) == STEPS
        assert a[key][first_step - 1 :] == b[key]


@pytest.fixture
def by_torchrun(base_args):
    """As ``launch``, from command lines."""

    def run(module, *args, processes):
        command = [module, *base_args, *args]
        if module == UPSTREAM:  # on CPU it needs the device module, and the datasets registered
            command = ["torchtitan.experiments.tst.upstream.cpu", *command]
            command += ["--experimental.custom_import=torchtitan.experiments.tst.extension"]
        return launches.succeeded(launches.torchrun(command, processes))

    return run


@pytest.mark.parametrize(
    ("model", "processes", "start_upstream", "start_ours"),
    [
        ("llama3", 1, "by_torchrun", "launch"),
        ("qwen3 tied", 1, "launch", "launch"),
        ("qwen3 MoE", 2, "launch", "launch"),
        pytest.param("llama3", 1, "by_torchrun", "by_torchrun", marks=pytest.mark.slow),
        pytest.param("llama3", 2, "by_torchrun", "by_torchrun", marks=pytest.mark.slow),
        pytest.param("qwen3", 1, "launch", "launch", marks=pytest.mark.slow),
        pytest.param("qwen3", 2, "launch", "launch", marks=pytest.mark.slow),
        pytest.param("qwen3 MoE", 1, "launch", "launch", marks=pytest.mark.slow),
    ],
)
def test_switched_off_is_upstreams_run(
    request, tmp_path, model, processes, start_upstream, start_ours
):
    section = ["--superposition.bag_size=1"] if processes == 2 else []
    for module, start, name in (
        (UPSTREAM, start_upstream, "upstream"),
        (TST, start_ours, "tst"),
    ):
        args = (*MODELS[model], *LOG, f"--training.steps={STEPS}")
        args += (f"--job.dump_folder={tmp_path / name}", *(section if module == TST else ()))
        request.getfixturevalue(start)(module, *args, processes=processes)
    same_scalars(tmp_path / "tst", tmp_path / "upstream")


@pytest.mark.parametrize(
    ("model", "processes"),
    [
        ("qwen3 MoE", 2),
        pytest.param("llama3", 1, marks=pytest.mark.slow),
        pytest.param("llama3", 2, marks=pytest.mark.slow),
    ],
)
def test_upstream_recovers_from_the_boundary_checkpoint(launch, tmp_path, model, processes):
    """Upstream's own trainer, no superposition section: the model is an ordinary one."""
    args = (*MODELS[model], *LOG, f"--training.steps={5 + STEPS}", *saving(100))
    folder = f"--job.dump_folder={tmp_path / 'tst'}"
    launch(TST, *args, *superposition(4, steps=5), folder, processes=processes)
    shutil.copytree(tmp_path / "tst/checkpoint/step-5", tmp_path / "upstream/checkpoint/step-5")
    launch(UPSTREAM, *args, f"--job.dump_folder={tmp_path / 'upstream'}", processes=processes)
    same_scalars(tmp_path / "tst", tmp_path / "upstream", first_step=6)


def test_upstream_refuses_the_section(launch, tmp_path):
    """It would otherwise train without superposition and not say so."""
    job = tmp_path / "job.toml"
    job.write_text("[superposition]\nbag_size = 4\nstep_ratio = 0.3\n")
    result = launch(UPSTREAM, f"--job.config_file={job}", check=False)
    assert result.failed
    assert "superposition" in result.output
