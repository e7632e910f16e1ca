import pytest

from conftest import ROOT
from torchtitan.experiments.tst.job_checks import check_job
from torchtitan.experiments.tst.job_config import SuperpositionConfigManager

CONFIGS = sorted((ROOT / "train_configs").rglob("*.toml"))


def load(path):
    return SuperpositionConfigManager().parse_args([f"--job.config_file={path}"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_is_valid(path, corpus, tokens, tmp_path):
    config = load(path)
    config.job.dump_folder = str(tmp_path)  # not one where such a run has been
    config.model.hf_assets_path = str(corpus / "tokenizer")
    shards = config.training.dataset == "token_shards"
    config.training.dataset_path = str(tokens if shards else corpus / "train.jsonl")
    config.validation.dataset_path = str(corpus / "validation.jsonl")
    check_job(config)


def test_demo_baseline_differs_in_the_section_and_the_run_folder_only():
    tst, baseline = (
        load(ROOT / "train_configs" / "demo" / f"{name}.toml").to_dict()
        for name in ("tst", "baseline")
    )
    different = {
        f"{section}.{key}"
        for section in tst
        for key in tst[section]
        if tst[section][key] != baseline[section][key]
    }
    assert {name for name in different if not name.startswith("superposition.")} == {
        "job.config_file",
        "job.description",
        "job.dump_folder",
    }
    assert baseline["superposition"]["bag_size"] == 1
