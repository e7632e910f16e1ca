"""Every way in which a run ends, and what is done with the run afterwards."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torchtitan.tools.logging import logger

from corpora import write_shards
from jobs import BOUNDARY, ON, STEPS, load_full, losses, saving
from tasks import write_task
from torchtitan.experiments.tst.resilience.checkpoint.inventory import (
    Kind,
    identify,
    list_checkpoints,
)

MODEL_ONLY = ("--checkpoint.enable", "--checkpoint.interval=4", "--checkpoint.keep_latest_k=0")
IN_HF = (*MODEL_ONLY, "--checkpoint.last_save_in_hf")


def cut_short(run: Path) -> None:
    """Leave what a kill during the last save does."""
    last = run / "checkpoint" / f"step-{STEPS}"
    (last / "manifest.json").unlink()
    last.rename(last.parent / f"saving-{STEPS}")


@dataclasses.dataclass
class Ending:
    """A way to end.

    Attributes:
        args: of the job.
        steps: after which it ends.
        newest: the checkpoint that commands take, before the job is launched again.
        kind: of that one.
        again: the steps that the job trains when it is launched again.
        after: what happens to the run folder then.
    """

    args: tuple[str, ...]
    kind: Kind = Kind.FULL
    steps: int = STEPS
    newest: int = STEPS
    again: tuple[int, ...] = ()
    after: Callable[[Path], None] | None = None


ENDINGS = {
    "full": Ending(saving(4)),
    "model only": Ending(MODEL_ONLY, Kind.MODEL),
    "Hugging Face": Ending(IN_HF, Kind.HUGGING_FACE),
    "killed in the last save": Ending(MODEL_ONLY, newest=4, again=(5, 6), after=cut_short),
    "killed in the last save of Hugging Face": Ending(
        IN_HF, newest=4, again=(5, 6), after=cut_short
    ),
    "by the data": Ending(saving(4), steps=5, newest=5),
    "at the boundary": Ending(
        (*saving(4), "--superposition.stop_at_boundary"), steps=BOUNDARY, newest=BOUNDARY
    ),
}


@pytest.fixture
def task(tmp_path, offline_harness):
    """Arguments of ``tst evaluate`` for a task of one question."""
    folder = tmp_path / "tasks"
    write_task(folder, "endings", [{"question": "def", "choices": [" a", " b"], "answer": 0}])
    return ("--tasks", "endings", "--include-path", folder, "--batch-size", 1)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("name", ENDINGS)
def test_what_is_done_with_a_run_that_has_ended(name, train, tmp_path, tst, task, monkeypatch):
    ending, run = ENDINGS[name], tmp_path / "run"
    job = (*ON, *ending.args)
    if name == "by the data":  # of five steps
        shards = write_shards(tmp_path / "shards", [[list(range(100)) * 19]])
        job += ("--training.dataset=token_shards", f"--training.dataset_path={shards}")
        job += ("--token_shards.at_end=stop",)
    lines = train(*job)
    assert losses(lines).keys() == set(range(1, ending.steps + 1))
    if ending.after:
        ending.after(run)
    last = run / "checkpoint" / f"step-{ending.newest}"
    assert identify(last) is ending.kind
    before = content(last)

    # export, evaluate and sample take the newest model there is, and say which
    result = tst("export", run, tmp_path / "hf")
    assert result.code == 0, result.stderr
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    if ending.kind is Kind.HUGGING_FACE:
        (weights,) = last.glob("*.safetensors")
        expected = load_file(weights)
        assert exported.keys() == expected.keys()
        assert all(exported[key].equal(expected[key]) for key in expected)
    else:
        assert exported["lm_head.weight"].equal(load_full(last)["output.weight"])
    result = tst("evaluate", run, *task)
    assert result.code == 0, result.stderr
    assert (run / f"evaluation-step-{ending.newest}.json").is_file()
    result = tst("sample", run, "--prompt", "def", "--samples", 1, "--tokens", 2)
    assert result.code == 0, result.stderr
    result = tst("compare", run)
    assert result.code == 0, result.stderr
    report = json.loads((run / "comparison.json").read_text())
    assert report["runs"][0]["end"]["step"] == ending.steps
    assert content(last) == before

    # launched again, it trains what is left, and a run that has ended stays as it is
    said = []
    monkeypatch.setattr(logger, "info", lambda message, *args: said.append(message))
    (run / "metrics.jsonl").unlink()
    again = losses(train(*job))
    assert tuple(again) == ending.again
    assert any(line.startswith("The run has ended") for line in said) == ending.kind.is_model
    if not ending.again:
        assert content(last) == before
    else:
        newest = list_checkpoints(run / "checkpoint")[-1]
        assert newest.step == STEPS
        assert newest.kind.is_model
        whole = {line["step"]: line["loss_metrics/global_avg_loss"] for line in lines}
        assert again == {step: whole[step] for step in ending.again}
    assert not list((run / "checkpoint").glob("saving-*"))
    assert not list((run / "checkpoint").glob("replaced-*"))
