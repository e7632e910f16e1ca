"""The job config of TorchTitan 0.2.2 with the sections of this package."""

from dataclasses import dataclass, field

from torchtitan.config import JobConfig as UpstreamJobConfig

from .sections import LMHead, LoadBalance, Resilience, Superposition, TextDataset, TokenShards

SECTION, TOKEN_SHARDS = "superposition", "token_shards"
TEXT_DATASET, LM_HEAD, RESILIENCE = "text_dataset", "lm_head", "resilience"
LOAD_BALANCE = "load_balance"


@dataclass
class JobConfig(UpstreamJobConfig):
    """TorchTitan's job config with the sections of this package."""

    superposition: Superposition = field(default_factory=Superposition)
    token_shards: TokenShards = field(default_factory=TokenShards)
    text_dataset: TextDataset = field(default_factory=TextDataset)
    lm_head: LMHead = field(default_factory=LMHead)
    load_balance: LoadBalance = field(default_factory=LoadBalance)
    resilience: Resilience = field(default_factory=Resilience)


def superposition_section(job_config: UpstreamJobConfig) -> Superposition:
    """Return the ``[superposition]`` section; for TorchTitan's own config, one that is off."""
    return getattr(job_config, SECTION, Superposition())


def token_shards_section(job_config: UpstreamJobConfig) -> TokenShards:
    """Return the ``[token_shards]`` section; for TorchTitan's own config, its defaults."""
    return getattr(job_config, TOKEN_SHARDS, TokenShards())


def text_dataset_section(job_config: UpstreamJobConfig) -> TextDataset:
    """Return the ``[text_dataset]`` section; for TorchTitan's own config, its defaults."""
    return getattr(job_config, TEXT_DATASET, TextDataset())


def lm_head_section(job_config: UpstreamJobConfig) -> LMHead:
    """Return the ``[lm_head]`` section; for TorchTitan's own config, its defaults."""
    return getattr(job_config, LM_HEAD, LMHead())


def load_balance_section(job_config: UpstreamJobConfig) -> LoadBalance:
    """Return the ``[load_balance]`` section; for TorchTitan's own config, its defaults."""
    return getattr(job_config, LOAD_BALANCE, LoadBalance())


def resilience_section(job_config: UpstreamJobConfig) -> Resilience:
    """Return the ``[resilience]`` section; for TorchTitan's own config, its defaults."""
    return getattr(job_config, RESILIENCE, Resilience())
