"""Write a comparison as files: numbers as JSON, plots, and one self-contained HTML report."""

import base64
import dataclasses
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config.differences import differences
from ..resilience.run_folder import CONFIG_FILE
from .comparison import Comparison, Pair, flops
from .curves import Curves, Place
from .plots import draw_curves, draw_experts, draw_scores
from .score_comparison import compare_scores, numbers_of_pair, numbers_of_run
from .tables import (
    EQUAL_FLOPS,
    NOTES,
    VIEWS,
    rows_of_experts,
    rows_of_runs,
    rows_of_scores,
    rows_of_view,
    title,
)

LOSSES, SCORES, EXPERTS = "Loss curves", "Scores over FLOPs", "Shares of experts"  # the plots
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 72rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; border-bottom: 2px solid #888; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } .scores td { white-space: nowrap; }
img { max-width: 100%; } code { font-size: 0.9em; }
.note { color: #555; font-size: 0.9rem; }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #e6e6e6; } th, td { border-color: #444; }
  .note { color: #aaa; } img { background: white; }
}
"""

_DEFINITIONS = """
<dl>
<dt>Latents, data tokens</dt><dd>Positions that the transformer sees, and tokens read. A bag of
<i>s</i> data tokens is one latent; without superposition the two are the same.</dd>
<dt>FLOPs</dt><dd>TorchTitan's count (of its MFU) for a latent, times the latents.</dd>
<dt>Hours</dt><dd>Hours of training, without validation, on the hardware of each run. Compare them
only if the hardware was the same.</dd>
<dt>At equal FLOPs, at equal data</dt><dd>The losses where the run that spent or read less ends,
interpolated linearly for the other run. "Both end there" means that both runs are at the end of
their learning-rate schedules, as far as their configs tell. Otherwise one run is in the middle of
its schedule, where its loss is higher than that of a run planned to end there.</dd>
<dt>Scores</dt><dd>Scores of checkpoints on tasks of the LM-Eval harness. "±" is the harness's
standard error over the documents of the task. The error of a difference takes the two scores as
independent. Both models answer the same questions, so its true error is usually smaller. "Within
error" means that the difference is smaller than its error.</dd>
<dt>Scores at equal FLOPs</dt><dd>The scores at the FLOPs of the run that was scored less far. If
the other run has no scored checkpoint there, its score and error are interpolated linearly between
the two checkpoints around it, and the table has the steps of both. Both checkpoints answer the same
questions, and their errors are taken as fully correlated. So this error is an upper bound. It does
not include the error of the interpolation itself. A score that would need extrapolation is missing.
Only scores with the same metric on the same number of documents are compared.</dd>
<dt>At equal loss</dt><dd>The higher of the two final losses, and where each run first reaches it.
The run with the lower final loss reaches it before its learning rate has decayed. So its speed-up
is smaller than that of a run planned to end there.</dd>
<dt>Below it from step</dt><dd>After this step, the run with superposition stays below the baseline
at equal FLOPs.</dd>
<dt>Spike, recovery</dt><dd>The spike is the highest training loss after the boundary minus the last
loss over bags. Recovery is the number of steps from the boundary until the loss is back there. Only
for losses in nats per token (superposition.loss "mce").</dd>
<dt>Shares of experts</dt><dd>An expert's share of the choices of its layer's router in one logged
step: largest and smallest of all layers. A dead expert got no token (in superposition, no
latent).</dd>
</dl>
"""


def write_comparison(
    runs: Sequence[Curves], comparison: Comparison, folder: Path, command: str
) -> list[Path]:
    """Write comparison.json, report.html and the plots.

    The plots are loss.png, scores.png if a run has scores, and experts.png for a mixture of
    experts.

    Args:
        runs: the runs that are compared.
        comparison: comparison of the runs.
        folder: folder of the files; created if it is missing.
        command: the command that the report names.

    Returns:
        The files for people: the report and the plots.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers, plot, report = (folder / f for f in ("comparison.json", "loss.png", "report.html"))
    plots = {LOSSES: plot}
    if any(run.scores for run in runs):
        plots[SCORES] = folder / "scores.png"
        draw_scores(runs, plots[SCORES])
    if any(run.experts for run in runs):
        plots[EXPERTS] = folder / "experts.png"
        draw_experts(runs, plots[EXPERTS])
    numbers.write_text(json.dumps(_numbers(runs, comparison), indent=2) + "\n")
    draw_curves(runs, comparison, plot)
    report.write_text(_html(runs, comparison, plots, command))
    return [report, *plots.values()]


def _numbers(runs: Sequence[Curves], comparison: Comparison) -> dict[str, Any]:
    """Return all numbers, unrounded, with speed-ups, gains and scores."""
    axes: dict[str, Callable[[Place], float]] = {
        "flops": flops,
        "hours": lambda at: at.hours,
        "steps": lambda at: at.step,
    }
    content = dataclasses.asdict(comparison)
    for entry, pair in zip(content["pairs"], comparison.pairs, strict=True):
        entry["equal_flops"]["gain"] = pair.equal_flops.gain
        entry["equal_data"]["gain"] = pair.equal_data.gain
        if pair.equal_loss:
            speed_up = {name: pair.equal_loss.speed_up(axis) for name, axis in axes.items()}
            entry["equal_loss"]["speed_up"] = speed_up
    for entry, run in zip(content["runs"], runs, strict=True):
        entry["scores"] = numbers_of_run(run)
    for entry, scores in zip(content["pairs"], compare_scores(runs), strict=True):
        entry["scores"] = numbers_of_pair(scores)
    return content


def _html(
    runs: Sequence[Curves], comparison: Comparison, plots: dict[str, Path], command: str
) -> str:
    """Return the report: text, tables, plots and definitions."""
    images = {name: _image(name, plot) for name, plot in plots.items()}
    scores = _scores(runs, images[SCORES]) if SCORES in images else []
    names = ", ".join(run.name for run in runs)
    parts = [
        f"<h1>{'Comparison of runs' if len(runs) > 1 else 'A run'}: {html.escape(names)}</h1>",
        *(f"<p>{html.escape(in_words(pair))}</p>" for pair in comparison.pairs),
        f'<p class="note">{NOTES[comparison.kind]}</p>',
        images[LOSSES],
        "<h2>Runs</h2>",
        _table(rows_of_runs(comparison)),
    ]
    if comparison.pairs:
        for view, meaning in VIEWS.items():
            parts += [f"<h2>At {view}</h2>", f"<p>{meaning}</p>"]
            parts.append(_table(rows_of_view(comparison, view)))
            parts += scores if view == EQUAL_FLOPS else []
        parts += ["<h2>What differs in the configs</h2>", _config_differences(runs, comparison)]
    else:
        parts += scores
    if EXPERTS in images:
        parts += ["<h2>Experts</h2>", images[EXPERTS], _table(rows_of_experts(runs))]
    parts += ["<h2>How it is counted</h2>", _DEFINITIONS]
    parts.append(f'<p class="note">Written by <code>{html.escape(command)}</code></p>')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(names)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _scores(runs: Sequence[Curves], image: str) -> list[str]:
    """Return the section of the scores: the table of the pairs, if there are any, and the plot."""
    pairs = compare_scores(runs)
    rows = rows_of_scores(pairs)
    return [
        f"<h2>Scores{f' at {EQUAL_FLOPS}' * bool(rows)}</h2>",
        "<p>Downstream scores of the runs' checkpoints, with standard errors.</p>",
        *([f'<div class="scores">{_table(rows)}</div>'] if rows else []),
        *(f"<p>{html.escape(reason)}.</p>" for pair in pairs for reason in pair.skipped),
        image,
    ]


def _image(name: str, plot: Path) -> str:
    image = base64.b64encode(plot.read_bytes()).decode()
    return f'<img alt="{name}" src="data:image/png;base64,{image}">'


def in_words(pair: Pair) -> str:
    """Return the comparison of two runs as one or two sentences."""
    equal, gain = pair.equal_flops, pair.equal_flops.gain
    if gain is None or pair.equal_loss is None:
        return f"{pair.run} has no next-token loss yet to compare with {pair.baseline}'s."
    words = (
        f"At equal FLOPs, {pair.run} is {abs(gain):.3f} nats {'below' if gain > 0 else 'above'} "
        f"{pair.baseline}: {equal.loss:.4f} against {equal.baseline_loss:.4f}"
    )
    words += "." if equal.ended else " (one of the two continues from there)."
    speed_up = pair.equal_loss.speed_up(flops)
    words += f" For a loss of {pair.equal_loss.loss:.4f} it took "
    if speed_up >= 1:
        return words + f"{speed_up:.2f} times fewer FLOPs."
    return words + f"{1 / speed_up:.2f} times more FLOPs."


def _table(rows: list[list[str]]) -> str:
    head, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
    )
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _config_differences(runs: Sequence[Curves], comparison: Comparison) -> str:
    configs = {run.name: run.folder / CONFIG_FILE for run in runs}
    rows = [["", "key", "run", "baseline"]]
    for pair in comparison.pairs:
        files = configs[pair.run], configs[pair.baseline]
        if missing := [file for file in files if not file.is_file()]:
            rows.append([title(pair), f"unknown: {missing[0]} is missing", "", ""])
            continue
        name = title(pair)
        for key, (value, other) in differences(*([str(file)] for file in files)).items():
            if key not in ("job.dump_folder", "job.description"):
                rows.append([name, key, f"{value}", f"{other}"])
                name = ""
    return _table(rows)
