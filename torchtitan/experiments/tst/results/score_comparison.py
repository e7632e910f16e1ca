"""Downstream scores at equal FLOPs, of every run with superposition and every baseline.

Only scores with the same metric on the same number of documents are compared.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .comparison import are_same, flops, is_at_its_end, neighbors
from .curves import Curves, ScoredCheckpoint
from .scores import METRICS, Score

Kind = tuple[str, int]  # metric and number of documents


@dataclass(frozen=True)
class ScoreAt:
    """The score of a run at a number of FLOPs.

    Attributes:
        score: the score. Between two checkpoints, value and standard error are interpolated
            linearly. Both checkpoints answer the same questions, and their errors are taken as
            fully correlated. So this error is an upper bound. It does not include the error of the
            interpolation itself.
        steps: step of the checkpoint with this score, or of the two around it.
    """

    score: Score
    steps: tuple[int, ...]


@dataclass(frozen=True)
class EqualScores:
    """The scores of two runs on a task at the same FLOPs.

    Attributes:
        task: the harness's name of the task.
        metric: the harness's name of the metric.
        documents: number of documents that each score is on.
        at: FLOPs of the run that was scored less far.
        run: score of the run with superposition; None if its first score is at more FLOPs.
        baseline: score of the baseline; None likewise.
        ended: whether the last score of both is there, at the end of their learning-rate schedules.
            The schedule of a run without a config is taken to end with its metrics.
    """

    task: str
    metric: str
    documents: int
    at: float
    run: ScoreAt | None
    baseline: ScoreAt | None
    ended: bool

    @property
    def difference(self) -> Score | None:
        """The score of the run with superposition minus that of the baseline."""
        if self.run is None or self.baseline is None:
            return None
        return self.run.score.minus(self.baseline.score)


@dataclass(frozen=True)
class PairOfScores:
    """The scores of a run with superposition and a baseline.

    Attributes:
        run: name of the run with superposition.
        baseline: name of the baseline.
        equal_flops: scores on each task that both have.
        skipped: for each task that both have and that is not compared, the reason in words.
    """

    run: str
    baseline: str
    equal_flops: list[EqualScores]
    skipped: list[str]


def compare_scores(runs: Sequence[Curves]) -> list[PairOfScores]:
    """Compare the scores of every run with superposition with those of every baseline.

    Args:
        runs: any number of runs; baselines are those without superposition.

    Returns:
        A comparison for each pair, in the order of :func:`.comparison.compare`. It is empty for a
        pair without a task that both have.
    """
    baselines = [run for run in runs if not run.boundary]
    return [_compare_pair(run, b) for run in runs if run.boundary for b in baselines]


def tasks_of(runs: Sequence[Curves]) -> list[str]:
    """Return the tasks of the runs' scores: first those of Table 3, then the others by name."""
    tasks = {scored.evaluation.task for run in runs for scored in run.scores}
    return [task for task in METRICS if task in tasks] + sorted(tasks - METRICS.keys())


def numbers_of_run(run: Curves) -> list[dict[str, Any]]:
    """Return the scores of a run's checkpoints, unrounded, each with its FLOPs."""
    return [
        {
            key: value
            for key, value in dataclasses.asdict(scored.evaluation).items()
            if key in ("step", "task", "metric", "documents", "score")
        }
        | {"flops": flops(scored.at)}
        for scored in run.scores
    ]


def numbers_of_pair(pair: PairOfScores) -> dict[str, Any]:
    """Return the comparison of a pair, unrounded, with the differences."""
    content = dataclasses.asdict(pair)
    for entry, equal in zip(content["equal_flops"], pair.equal_flops, strict=True):
        difference = equal.difference
        entry["difference"] = dataclasses.asdict(difference) if difference else None
        entry["within_error"] = difference.is_within_error if difference else None
    return {key: content[key] for key in ("equal_flops", "skipped")}


def _compare_pair(run: Curves, baseline: Curves) -> PairOfScores:
    pair = PairOfScores(run.name, baseline.name, [], [])
    for task in tasks_of([run]):
        of_run, of_baseline = _by_kind(run, task), _by_kind(baseline, task)
        if not of_baseline:
            continue
        found = [
            _equal_scores(run, baseline, of_run[kind], of_baseline[kind])
            for kind in of_run
            if kind in of_baseline
        ]
        if found:  # a limit of documents may have changed: the most documents that can be compared
            best = max(found, key=lambda equal: (equal.difference is not None, equal.documents))
            pair.equal_flops.append(best)
        else:
            reason = f"{run.name} has {_in_words(of_run)}, {baseline.name} {_in_words(of_baseline)}"
            pair.skipped.append(
                f"{task} of {run.name} and {baseline.name} is skipped: {reason}. Scores are "
                "compared on the same number of documents and with the same metric"
            )
    return pair


def _by_kind(run: Curves, task: str) -> dict[Kind, list[ScoredCheckpoint]]:
    """Return a run's scores on a task by metric and number of documents."""
    found: dict[Kind, list[ScoredCheckpoint]] = {}
    for scored in run.scores:
        if scored.evaluation.task == task:
            kind = (scored.evaluation.metric, scored.evaluation.documents)
            found.setdefault(kind, []).append(scored)
    return found


def _in_words(kinds: Iterable[Kind]) -> str:
    return " and ".join(f"{metric} on {documents:,} documents" for metric, documents in kinds)


def _equal_scores(
    run: Curves,
    baseline: Curves,
    of_run: list[ScoredCheckpoint],
    of_baseline: list[ScoredCheckpoint],
) -> EqualScores:
    """Compare scores on a task with the same metric on the same number of documents."""
    last, of_other = of_run[-1], of_baseline[-1]
    ends = flops(last.at), flops(of_other.at)
    at, ended = min(ends), False
    places = (at, at)
    if are_same(*ends):  # the last scores as they are
        places = ends
        ended = _is_at_its_end(last, run) and _is_at_its_end(of_other, baseline)
    return EqualScores(
        task=last.evaluation.task,
        metric=last.evaluation.metric,
        documents=last.evaluation.documents,
        at=at,
        run=_score_at(of_run, places[0]),
        baseline=_score_at(of_baseline, places[1]),
        ended=ended,
    )


def _is_at_its_end(last: ScoredCheckpoint, run: Curves) -> bool:
    return is_at_its_end(last.at.step, run.steps or round(run.end.step))


def _score_at(scored: list[ScoredCheckpoint], x: float) -> ScoreAt | None:
    """Return the score at ``x`` FLOPs; None outside of the scored checkpoints."""
    around = neighbors([flops(one.at) for one in scored], x)
    if around is None:
        return None
    before, after = (scored[index].evaluation for index in around[:2])
    if before is after:
        return ScoreAt(before.score, (before.step,))
    score, other, share = before.score, after.score, around[2]
    error = None
    if score.error is not None and other.error is not None:
        error = score.error + share * (other.error - score.error)
    value = score.value + share * (other.value - score.value)
    return ScoreAt(Score(value, error), (before.step, after.step))
