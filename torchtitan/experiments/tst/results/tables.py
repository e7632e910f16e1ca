"""A comparison of runs as tables of text, for the console and for the report."""

from collections.abc import Sequence

from ..planning.numbers import count
from .comparison import (
    TRAINING,
    VALIDATION,
    Comparison,
    EqualCost,
    Pair,
    Summary,
    flops,
    is_at_its_end,
)
from .curves import Curves, ExpertShares
from .score_comparison import PairOfScores, ScoreAt

EQUAL_FLOPS = "equal FLOPs"
VIEWS = {
    EQUAL_FLOPS: "Both have spent the same FLOPs: the paper's first claim is a lower loss here.",
    "equal loss": "What both spent until they first reached the higher of the two final losses.",
    "equal data": "Both have read the same data tokens: here the paper, too, finds the baseline "
    "ahead.",
}
NOTES = {
    VALIDATION: "Losses are next-token losses on held-out data, in both phases.",
    TRAINING: "Not every run has validation: losses are next-token training losses, trailing means "
    "over 2 % of the logged steps.",
}


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def rows_of_runs(comparison: Comparison) -> list[list[str]]:
    """Return a row with the summary of each run; the first row is the head."""
    head = ["run", "s", "steps", "of these in superposition", "data tokens", "latents", "FLOPs"]
    head += ["hours", f"final {comparison.kind} loss", "spike at the boundary", "recovered after"]
    rows = [head]
    for run in comparison.runs:
        recovered = "-" if run.spike is None else "not yet"
        if run.recovery_steps is not None:
            recovered = f"{run.recovery_steps:,.0f} steps"
        rows.append(
            [
                run.name,
                ", ".join(map(str, run.bag_sizes)),
                _steps(run),
                f"{run.boundary:,}" if run.boundary else "-",
                count(run.end.data_tokens),
                count(run.end.latents),
                f"{run.end.flops:.3e}",
                f"{run.end.hours:,.1f}" if run.end.hours >= 100 else f"{run.end.hours:.3g}",
                _loss(run.final_loss),
                "-" if run.spike is None else f"{run.spike:+.3f}",
                recovered,
            ]
        )
    return rows


def rows_of_experts(runs: Sequence[Curves]) -> list[list[str]]:
    """Return a row with the experts' balance for each run; the first row is the head.

    Empty if no run has experts.
    """
    head = ["run", "largest share, at the boundary", "after the boundary", "at the end"]
    head += ["smallest share at the end", "dead experts at the end"]
    rows = [head]
    for run in runs:
        if run.experts:
            before = [shares for shares in run.experts if shares.at.step <= run.boundary]
            after = [shares for shares in run.experts if shares.at.step > run.boundary]
            last = run.experts[-1]
            rows.append(
                [
                    run.name,
                    _largest(before[-1:]),
                    _largest(after[:1] if before else []),
                    _largest([last]),
                    f"{min(last.smallest.values()):.1f} %",
                    f"{last.dead}",
                ]
            )
    return rows if len(rows) > 1 else []


def _largest(shares: Sequence[ExpertShares]) -> str:
    return " ".join(f"{max(of_step.largest.values()):.1f} %" for of_step in shares) or "-"


def rows_of_view(comparison: Comparison, view: str) -> list[list[str]]:
    """Return a row for each pair, for one of :data:`VIEWS`; the first row is the head."""
    if view == "equal loss":
        head = ["", "loss", "FLOPs", "baseline's", "speed-up, FLOPs", "speed-up, hours"]
        return [head, *(_equal_loss_row(pair) for pair in comparison.pairs)]
    unit = "FLOPs" if view == EQUAL_FLOPS else "data tokens"
    head = ["", unit, "loss", "baseline's", "lower by"]
    if view == EQUAL_FLOPS:
        head.append("below it from step")
    head.append("both end there")
    return [head, *(_equal_cost_row(pair, view) for pair in comparison.pairs)]


def _equal_loss_row(pair: Pair) -> list[str]:
    equal = pair.equal_loss
    if equal is None:
        return [title(pair), *["-"] * 5]
    return [
        title(pair),
        _loss(equal.loss),
        f"{equal.at.flops:.3e}",
        f"{equal.baseline_at.flops:.3e}",
        f"{equal.speed_up(flops):.2f}",
        f"{equal.speed_up(lambda at: at.hours):.2f}",
    ]


def _equal_cost_row(pair: Pair, view: str) -> list[str]:
    equal: EqualCost = pair.equal_flops if view == EQUAL_FLOPS else pair.equal_data
    at = "-"
    if equal.at is not None:
        at = f"{equal.at:.3e}" if view == EQUAL_FLOPS else count(equal.at)
    row = [
        title(pair),
        at,
        _loss(equal.loss),
        _loss(equal.baseline_loss),
        "-" if equal.gain is None else f"{equal.gain:+.3f}",
    ]
    if view == EQUAL_FLOPS:
        row.append(f"{pair.below_from.step:,.0f}" if pair.below_from else "-")
    return [*row, "yes" if equal.ended else "no"]


def rows_of_scores(pairs: Sequence[PairOfScores]) -> list[list[str]]:
    """Return a row for each task of each pair; the first row is the head.

    Empty if no pair has scores on the same task.
    """
    head = ["", "task", "FLOPs", "step", "score (%)", "baseline's step", "baseline's score (%)"]
    rows = [[*head, "difference", "both end there"]]
    for pair in pairs:
        name = title(pair)
        for equal in pair.equal_flops:
            difference = equal.difference
            rows.append(
                [
                    name,
                    equal.task,
                    f"{equal.at:.3e}",
                    *_score_cells(equal.run),
                    *_score_cells(equal.baseline),
                    difference.as_difference if difference else "-",
                    "yes" if equal.ended else "no",
                ]
            )
            name = ""  # once for all tasks
    return rows if len(rows) > 1 else []


def _score_cells(found: ScoreAt | None) -> list[str]:
    if found is None:
        return ["-", "-"]
    return [" to ".join(f"{step:,}" for step in found.steps), str(found.score)]


def title(pair: Pair | PairOfScores) -> str:
    """Return the name of a pair in tables."""
    return f"{pair.run} against {pair.baseline}"


def _steps(run: Summary) -> str:
    """Return the last logged step, and the number of steps if the run is not at its end."""
    whole = "" if is_at_its_end(run.end.step, run.steps) else f" of {run.steps:,}"
    return f"{run.end.step:,.0f}{whole}"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
