import shutil

import pytest

from jobs import ROOT
from torchtitan.experiments.tst.checks.job import check_job
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.planning.plan import default_ranks

CONFIGS = sorted((ROOT / "train_configs").rglob("*.toml"))


def load(path):
    return SuperpositionConfigManager().parse_args([f"--job.config_file={path}"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_is_valid(path, corpus, tokens, tmp_path, monkeypatch):
    config = load(path)
    monkeypatch.setenv("WORLD_SIZE", str(default_ranks(config)))
    config.job.dump_folder = str(tmp_path)  # not one where such a run has been
    config.model.hf_assets_path = str(corpus / "tokenizer")
    config.validation.dataset_path = str(corpus / "validation.jsonl")
    if config.token_shards.paths:
        copy = shutil.copytree(tokens, tmp_path / "more")
        config.token_shards.paths = [str(tokens), str(copy)]
    else:
        shards = config.training.dataset == "token_shards"
        config.training.dataset_path = str(tokens if shards else corpus / "train.jsonl")
    check_job(config)
