"""Write docs/results.md and docs/experiments.md from templates and CSV files, and their plots."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tomli

from torchtitan.experiments.tst import paper
from torchtitan.experiments.tst.config.sections import Superposition
from torchtitan.experiments.tst.config.stages import steps_of_stages
from torchtitan.experiments.tst.core import Schedule
from torchtitan.experiments.tst.planning.numbers import count
from torchtitan.experiments.tst.planning.surface_plots import draw_lines, draw_surfaces

from . import tables
from .analysis import Lead, Results, baseline_of, mean_lead
from .plots import draw_leads, draw_losses
from .records import (
    CURVES_CSV,
    DOCS,
    OUTPUT,
    RUNS_CSV,
    Recipe,
    read_losses,
    read_records,
    stages_of,
)
from .sweeps import BASE, FRESH_SEEDS, SEARCH_SEED

TEMPLATES = sorted(Path(__file__).with_name("pages").glob("*.md"))
TESTED: list[tuple[list[int] | int, float]] = [
    *((2, 0.3), (4, 0.3), (8, 0.3), (4, 0.45)),
    *(([8, 4, 2], 0.3), ([8, 4, 2], 0.45)),
]
_JOB = tomli.loads((DOCS.parent / BASE).read_text())
CPU_CORPORA = ("program", "prose")


def recipe(
    sizes: list[int] | int = 1,
    ratio: list[float] | float = 0.3,
    corpus: str = "program",
    steps: int = _JOB["training"]["steps"],
    lr: float = _JOB["optimizer"]["lr"],
    model: str = _JOB["model"]["flavor"],
    **others: str | bool,
) -> Recipe:
    """Return the recipe of these bag sizes and step ratios, in the form of ``[superposition]``."""
    stages = ""
    if sizes != 1:
        section = Superposition(bag_size=sizes, step_ratio=ratio)
        bag_sizes = [sizes] if isinstance(sizes, int) else sizes
        schedule = Schedule.of(bag_sizes, steps_of_stages(section, steps))
        stages = stages_of(schedule)
    base = Recipe(corpus, model, lr, stages, "full", "uniform", False, steps)
    return base.with_(**others)


def small(sizes: list[int] | int = 1, ratio: float = 0.3, **others: str | bool | int) -> Recipe:
    """Return a recipe of the first runs: 0.09M parameters."""
    return recipe(sizes, ratio, **{"steps": 2400, "lr": 3e-3, "model": "demo_small", **others})


def paper_lead(bag_size: int, ratio: float) -> float:
    """Return the lead of the paper's 270M in 20,000 steps (Table 4), nats."""
    surface = paper.nearest_surface(paper.PARAMETERS["270M"], 20_000, "uniform")
    assert surface.baseline is not None
    return surface.baseline - surface.values[ratio, bag_size]


def paper_gain(name: str) -> float:
    """Return the lead of a run of Table 1 over its baseline, nats."""
    runs = paper.runs()
    return runs[f"{name}-baseline"].final_loss - runs[f"{name}-tst"].final_loss


def paper_reinit() -> float:
    """Return the lead of the paper's 3B whose embedding and LM head were initialised again."""
    runs = paper.runs()
    return runs["3B-20k-baseline"].final_loss - runs["3B-20k-tst-reinit"].final_loss


def fill_in(template: str, results: Results) -> str:
    """Return a page. Every figure of our own runs is an expression in the template.

    Raises:
        jinja2.UndefinedError: for an unknown name in the template.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    ours: dict[str, Callable[..., Any]] = {
        name: functools.partial(getattr(tables, name), results)
        for name in ("comparison", "by_share", "learning_rates", "lengths")
    }

    def lead(of: Recipe, seeds: Sequence[int], over: Recipe | None = None) -> Lead:
        return results.lead(of, over or baseline_of(of), seeds)

    def loss(of: Recipe, seeds: Sequence[int]) -> float:
        return tables.mean(results.runs(of, seeds))

    def data(of: Recipe) -> str:
        return count(results.runs(of)[0].data_tokens)

    def latents_per_parameter(of: Recipe) -> float:
        run = results.runs(of)[0]
        return run.latents / run.parameters

    def tokens(corpus: str) -> int:
        return next(
            int(run.corpus_id.rpartition("-")[2])
            for run in results.records
            if run.corpus == corpus and run.corpus_id
        )

    def longest(corpus: str) -> int:
        return max(run.data_tokens for run in results.records if run.corpus == corpus)

    def hours() -> float:
        return sum(run.hours for run in results.records)

    def tested(corpus: str) -> list[Recipe]:
        return [recipe(sizes, ratio, corpus) for sizes, ratio in TESTED]

    ours |= {"lead": lead, "loss": loss, "data": data, "runs": results.runs, "tested": tested}
    ours |= {"tokens": tokens, "longest": longest, "hours": hours, "count": count}
    ours |= {"mean_lead": mean_lead, "latents_per_parameter": latents_per_parameter}
    papers = {"paper_lead": paper_lead, "paper_gain": paper_gain, "paper_reinit": paper_reinit}
    names = {"recipe": recipe, "small": small, "fresh": FRESH_SEEDS}
    return environment.from_string(template).render(**names, **ours, **papers)


def write(folder: Path) -> None:
    """Write the plots and, if ``folder`` is docs/results, the pages.

    Args:
        folder: folder of the CSV files.
    """
    results, losses = Results(read_records(folder / RUNS_CSV)), read_losses(folder / CURVES_CSV)
    draw(results, losses, folder)
    if folder.resolve() == OUTPUT.resolve():
        for template in TEMPLATES:
            (DOCS / template.name).write_text(fill_in(template.read_text(), results))
    print(f"{len(results.records)} runs: {folder}")


def draw(results: Results, losses: dict[str, dict[int, float]], folder: Path) -> None:
    """Draw the plots whose runs exist.

    Args:
        results: all runs.
        losses: validation loss of each run by step.
        folder: folder of the PNG files.
    """
    own = tables.surface(results, small(), 0) if results.runs(small(), [0]) else None
    if own and own.values:
        of_paper = paper.nearest_surface(own.parameters, own.steps, own.weighting)
        surfaces = {f"validation loss: {own.title}": own, f"paper: {of_paper.title}": of_paper}
        draw_surfaces(surfaces, folder / "surface.png")
    lines: dict[str, list[tuple[Any, float]]] = {}
    searched = tables.schedules(results, recipe(), SEARCH_SEED)
    for run in sorted(searched, key=lambda run: (len(run.bag_sizes), run.bag_sizes)):
        sizes = ", ".join(map(str, run.bag_sizes))
        lines.setdefault(f"s = {sizes}", []).append((run.step_ratio, run.loss))
    if lines:
        x_label = "r, share of steps in superposition"
        draw_lines(lines, x_label, "final validation loss", folder / "search.png")
    tested = [recipe(*how, corpus) for corpus in CPU_CORPORA for how in TESTED]
    draw_leads(results, tested, FRESH_SEEDS, folder / "leads.png")
    for corpus in CPU_CORPORA:
        of_corpus = [recipe(sizes, 0.3, corpus) for sizes in (1, 4, [8, 4, 2])]
        draw_losses(results, losses, of_corpus, FRESH_SEEDS, folder / f"losses_{corpus}.png")
