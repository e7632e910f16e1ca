"""The scores of a run's checkpoints on tasks of the LM-Eval harness: ``evaluations.jsonl``.

``tst evaluate`` writes a line for each task of a checkpoint. This module does not import the
harness, so that comparisons and tables need no extra.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVALUATIONS_FILE = "evaluations.jsonl"  # in the run folder
# The columns of Table 3, and the metric of each. The paper does not say which metrics it uses.
# These are the harness's length-normalised accuracies where it has them.
METRICS = {
    "hellaswag": "acc_norm",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "mmlu": "acc",
    "boolq": "acc",
    "openbookqa": "acc_norm",
    "piqa": "acc_norm",
    "winogrande": "acc",
}


@dataclass(frozen=True)
class Score:
    """A score with its standard error, or the difference of two.

    Attributes:
        value: percent.
        error: standard error as the harness estimates it, percent; None without an estimate.
    """

    value: float
    error: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.1f}{self._plus_minus}"

    @property
    def _plus_minus(self) -> str:
        return "" if self.error is None else f" ± {self.error:.1f}"

    def minus(self, other: "Score") -> "Score":
        """Return the difference to another model's score on the same task.

        Its standard error takes the two as independent. Because both models answer the same
        questions, the true error is usually smaller.
        """
        error = None
        if self.error is not None and other.error is not None:
            error = math.hypot(self.error, other.error)
        return Score(self.value - other.value, error)

    @property
    def is_within_error(self) -> bool:
        """Whether this difference is smaller than its standard error."""
        return self.error is not None and abs(self.value) < self.error

    @property
    def as_difference(self) -> str:
        """This difference for people, marked if it is smaller than its error."""
        mark = " (within error)" if self.is_within_error else ""
        return f"{self.value:+.1f}{self._plus_minus}{mark}"


@dataclass(frozen=True)
class Evaluation:
    """The score of a checkpoint on a task.

    Attributes:
        step: step of the checkpoint.
        task: the harness's name of the task.
        metric: the harness's name of the metric.
        score: score and standard error, percent.
        documents: number of documents of the task that were scored.
        limit: the limit of documents for each task, as set by the user; None for all.
        data_tokens: data tokens that the run had read by this step; None if unknown.
        latents: positions that the transformer had seen by this step; None if unknown.
        checkpoint: identifies the checkpoint's content; a step that is trained again has another.
    """

    step: int
    task: str
    metric: str
    score: Score
    documents: int
    limit: int | None
    data_tokens: int | None
    latents: int | None
    checkpoint: str

    def to_line(self) -> dict[str, Any]:
        """Return the line of the file."""
        rest = {key: value for key, value in vars(self).items() if key != "score"}
        return rest | {"score(%)": self.score.value, "standard_error(%)": self.score.error}

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> "Evaluation":
        """Return the evaluation of a line of the file."""
        rest = {key: value for key, value in line.items() if not key.endswith("(%)")}
        return cls(**rest, score=Score(line["score(%)"], line["standard_error(%)"]))


def read_lines(run: Path) -> list[Evaluation]:
    """Return all evaluations of a run, the oldest first."""
    path = run / EVALUATIONS_FILE
    if not path.is_file():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            found.append(Evaluation.of_line(json.loads(text)))
        except (ValueError, KeyError, TypeError):
            continue  # the incomplete line of an evaluation that was killed
    return found


ANY_LIMIT = object()


def read_evaluations(run: Path, limit: Any = ANY_LIMIT) -> list[Evaluation]:
    """Return the evaluations of a run by step, one for each step and task.

    Of a step that was trained again, only those of its newest checkpoint count. The one with the
    most documents counts, and of these the last.

    Args:
        run: the run folder.
        limit: count only those with this limit of documents; None for those of whole tasks.
    """
    lines = read_lines(run)
    newest = {evaluation.step: evaluation.checkpoint for evaluation in lines}
    chosen: dict[tuple[int, str], Evaluation] = {}
    for evaluation in lines:
        place = (evaluation.step, evaluation.task)
        counts = evaluation.checkpoint == newest[evaluation.step]
        if not counts or limit not in (ANY_LIMIT, evaluation.limit):
            continue
        if place not in chosen or evaluation.documents >= chosen[place].documents:
            chosen[place] = evaluation
    return sorted(chosen.values(), key=lambda evaluation: evaluation.step)
