"""The configs of train_configs/paper and the planner, held to the paper's tables."""

import functools
import math
import re

import pytest
import tomli
from torchtitan.models.llama3 import llama3_args
from torchtitan.models.qwen3 import qwen3_args

from jobs import ROOT
from torchtitan.experiments.tst import paper
from torchtitan.experiments.tst.checks.job import check_config
from torchtitan.experiments.tst.config.differences import ALLOWED, differences, is_allowed
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.planning.plan import (
    GPUS,
    default_ranks,
    make_plan,
    mfu_of_paper,
    parameters_of,
)

FOLDER = ROOT / "train_configs" / "paper"
RUNS = paper.runs()
ABLATIONS = sorted((FOLDER / "ablations").glob("*.toml"))
STAGES = sorted(FOLDER.glob("*-stages.toml"))  # ours: a TST run with several bag sizes
POWER_LAW = FOLDER / "10B-A1B-50k-power-law.toml"  # ours: with the paper's weighting for its s
ALL = [*(FOLDER / f"{name}.toml" for name in RUNS), *ABLATIONS, *STAGES, POWER_LAW]

# By table of the paper's set-up: B200s, learning rate, dataset folders
SET_UP = {
    "270M": (8, 2e-3, ["./data/dclm-llama3"]),
    "600M": (8, 1e-3, ["./data/dclm-llama3"]),
    "3B": (64, 2e-4, ["./data/dclm-llama3"]),
    "10B-A1B": (64, 3e-4, ["./data/dclm-qwen3", "./data/fineweb-edu-qwen3"]),
}
OURS = {
    "eps",
    "weight_decay",
    "decay_type",
    "min_lr_factor",
    "seq_len",
    "max_norm",
    "seed",
    "method",
    "coefficient",
}
OF_THE_MACHINE = {"local_batch_size", "mode", "data_parallel_shard_degree", "enable"}


@functools.cache  # a config that nobody changes
def load(path):
    return SuperpositionConfigManager().parse_args([f"--job.config_file={path}"])


def plan_of(name):
    config = load(FOLDER / f"{name}.toml")
    check_config(config, default_ranks(config))
    return config, make_plan(config, default_ranks(config))


def printed(number: float, like: str) -> str:
    """As the paper prints it: 104.86e9 like "105B"."""
    digits, unit = like[:-1], {"B": 1e9, "T": 1e12}[like[-1]]
    decimals = len(digits.partition(".")[2])
    return f"{number / unit:.{decimals}f}{like[-1]}"


def test_there_is_a_config_for_each_run_and_no_other():
    ours = {*STAGES, POWER_LAW}
    assert {path.stem for path in {*FOLDER.glob("*.toml")} - ours} == set(RUNS)
    of_stages = {path.stem.replace("-stages", "-tst") for path in STAGES}
    assert of_stages == {name for name in RUNS if name.endswith("-tst")}


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_stages_differ_from_the_papers_run_in_the_bag_sizes_alone(path):
    name = path.stem.replace("-stages", "-tst")
    found = differences([str(FOLDER / f"{name}.toml")], [str(path)])
    assert found.keys() == {"job.dump_folder", "job.description", "superposition.bag_size"}
    assert re.search(r"^bag_size = \[.*\] # ours$", path.read_text(), re.MULTILINE)
    (_, plan), (_, of_paper) = plan_of(path.stem), plan_of(name)
    assert len(plan.superposition) == 3
    for key in ("steps", "data_tokens", "latents", "flops"):
        assert getattr(plan, key) == getattr(of_paper, key)


@pytest.mark.parametrize("name", RUNS)
def test_steps_and_tokens_are_those_of_table_1(name):
    run, (_, plan) = RUNS[name], plan_of(name)
    assert plan.steps == run.total_steps
    assert plan.steps - plan.recovery.steps == (run.superposition_steps or 0)
    # 100,000 * 2^21 is 209.7B, which the paper prints as 209B; all others are rounded
    cut_off = 0.5e9 if name == "270M-100k-baseline" else 0
    assert printed(plan.data_tokens - cut_off, run.total_tokens) == run.total_tokens
    for superposition in plan.superposition:
        assert superposition.stage.bag_size == run.bag_size
        tokens = printed(superposition.data_tokens, run.superposition_tokens)
        assert tokens == run.superposition_tokens
        assert superposition.flops_per_step == plan.recovery.flops_per_step
    assert len(plan.superposition) == bool(run.superposition_tokens)
    assert plan.latents == run.latents


# The paper's hours are not quite proportional to steps: 36,000 steps of 3B are 1.794 times 20,000
# and not 1.8, 50,000 are 2.518 times, and the TST run of 10B-A1B took 3 % less a step than its
# baseline. There the plan is off by as much.
DEVIATION = {"3B-36k-baseline": 0.004, "3B-50k-baseline": 0.0075, "10B-A1B-50k-tst": 0.033}


@pytest.mark.parametrize("name", RUNS)
def test_b200_hours_are_those_of_table_1(name):
    run, (config, plan) = RUNS[name], plan_of(name)
    hours = plan.gpu_hours(GPUS["B200"], mfu_of_paper(config, plan))
    if name in DEVIATION:
        assert hours == pytest.approx(run.b200_hours, rel=DEVIATION[name])
        assert round(hours) != run.b200_hours, "no deviation any more"
    else:
        assert round(hours) == run.b200_hours


def test_the_headline_speed_up():
    """2.5 times less compute to the loss of the baseline."""
    plans = [plan_of(name)[1] for name in ("10B-A1B-125k-baseline", "10B-A1B-50k-tst")]
    assert f"{plans[0].flops / plans[1].flops:.1f}" == "2.5"
    assert RUNS["10B-A1B-50k-tst"].final_loss <= RUNS["10B-A1B-125k-baseline"].final_loss


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_set_up_is_the_printed_one(path):
    config = load(path)
    ranks, lr, folders = SET_UP[config.model.flavor]
    assert default_ranks(config) == ranks
    optimizer, schedule, training = config.optimizer, config.lr_scheduler, config.training
    assert (optimizer.name, optimizer.lr) == ("AdamW", lr)
    assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.95)
    assert (schedule.warmup_steps, schedule.decay_ratio) == (2000, 0.1)
    tokens = 2**23 if config.model.flavor == "10B-A1B" else 2**21
    assert training.global_batch_size * training.seq_len == tokens
    assert (config.token_shards.paths or [training.dataset_path]) == folders
    assert config.token_shards.weights == ([0.5, 0.5] if len(folders) == 2 else [])
    args = (llama3_args if config.model.name == "llama3" else qwen3_args)[config.model.flavor]
    assert not getattr(args, "enable_weight_tying", False)
    if config.model.name == "llama3":
        assert args.vocab_size == 128_256


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_what_the_paper_leaves_open_is_marked(path):
    section = ""
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section, of_machine = line[1 : line.index("]")], "of the machine" in line
        elif key := re.match(r"(\w+) = ", line):
            comment = line.partition(" # ")[2]
            ours = key[1] in OURS or (key[1] == "flavor" and "10B" in line)
            varied = {"bag_size": STAGES, "weighting": [POWER_LAW]}
            if ours or path in varied.get(key[1], []):
                assert comment.startswith("ours"), line
            elif key[1] in OF_THE_MACHINE and section not in ("superposition", "checkpoint"):
                assert of_machine or comment == "of the machine", line
            else:
                assert "ours" not in comment or key[1] == "hf_assets_path", line


PAIRS = [
    (f"{run.model}-{run.total_steps // 1000}k-baseline", name)
    for name, run in RUNS.items()
    if run.bag_size and run.model != "10B-A1B"
]


@pytest.mark.parametrize(
    ("baseline", "other"),
    [
        *((FOLDER / f"{baseline}.toml", FOLDER / f"{name}.toml") for baseline, name in PAIRS),
        *(
            (FOLDER / f"{path.stem.partition('-')[0]}-20k-baseline.toml", path)
            for path in ABLATIONS
        ),
        (ROOT / "train_configs/demo/baseline.toml", ROOT / "train_configs/demo/tst.toml"),
    ],
    ids=lambda path: path.stem,
)
def test_a_tst_run_differs_from_its_baseline_in_the_section_alone(baseline, other):
    found = differences([str(baseline)], [str(other)])
    assert "superposition.bag_size" in found
    assert [key for key in found if not is_allowed(key, ALLOWED)] == []


def test_the_mixture_of_experts_differs_in_its_steps_too():
    found = differences(
        [str(FOLDER / "10B-A1B-125k-baseline.toml")], [str(FOLDER / "10B-A1B-50k-tst.toml")]
    )
    beyond = [key for key in found if not is_allowed(key, ALLOWED)]
    assert beyond == ["training.steps"]


def test_the_power_law_differs_from_the_papers_run_in_the_weighting_alone():
    found = differences([str(FOLDER / "10B-A1B-50k-tst.toml")], [str(POWER_LAW)])
    assert found.keys() == {"job.dump_folder", "job.description", "superposition.weighting"}
    assert load(POWER_LAW).superposition.weighting == "power_law"


def test_ablations_are_those_of_the_paper():
    sections = {path.stem: tomli.loads(path.read_text())["superposition"] for path in ABLATIONS}
    for mode in ("full", "input", "output"):
        section = sections[f"270M-20k-{mode}"]
        assert section == {"bag_size": 4, "step_ratio": 0.5, "mode": mode}
    weightings = {s["weighting"] for s in sections.values() if "weighting" in s}
    assert weightings == {"power_law", "exponential", "first_token", "fitted"}
    assert {s["loss"] for s in sections.values() if "loss" in s} == {"mce_alt", "bce", "hinge"}
    assert {s["scale"] for s in sections.values() if "scale" in s} == {"batch"}
    reinit = load(FOLDER / "3B-20k-tst-reinit.toml").superposition.reinit_at_recovery
    assert reinit == ["tok_embeddings", "output"]


def test_sizes_of_the_flavors():
    for model, parameters in paper.PARAMETERS.items():
        config = load(next(p for p in ALL if p.stem.startswith(f"{model}-")))
        assert parameters_of(config) == parameters


def test_surfaces_are_those_of_the_tables():
    by_name = {(s.model, s.steps, s.weighting): s for s in paper.surfaces()}
    small = by_name["270M", 20_000, "uniform"]
    assert (small.baseline, small.values[0.3, 6], small.values[1.0, 16]) == (3.2124, 3.1423, 6.5519)
    assert (small.bag_sizes, len(small.ratios)) == (list(range(2, 17)), 10)
    # a run of Table 1 is a point of the surface, up to an oddity of the paper at 600M
    for name in ("270M-20k-tst", "270M-100k-tst", "600M-20k-tst"):
        run = RUNS[name]
        loss = by_name[run.model, run.total_steps, "uniform"].values[0.3, run.bag_size]
        assert loss == pytest.approx(run.final_loss, abs=0.001)
    assert (1.0, 5) not in by_name["600M", 20_000, "uniform"].values, "blank in the paper"
    assert (small.best, small.quantity) == ((0.3, 7), "final loss (nats per token)")


@pytest.mark.parametrize("task", paper.SCORE_TASKS)
def test_score_surfaces_are_those_of_the_tables(task):
    """Tables 8 to 28. Of two runs in each, Table 3 has the scores too, with one decimal."""
    sizes = {("270M", 20_000): 16, ("270M", 100_000): 13, ("600M", 20_000): 13}
    surfaces = {(s.model, s.steps): s for s in paper.score_surfaces(task)}
    assert surfaces.keys() == sizes.keys()
    for (model, steps), surface in surfaces.items():
        assert (surface.task, surface.weighting, surface.quantity) == (task, "uniform", "score (%)")
        assert surface.ratios == [n / 10 for n in range(1, 10)]
        assert surface.bag_sizes == list(range(2, sizes[model, steps] + 1))
        cells = {(r, s) for r in surface.ratios for s in surface.bag_sizes}
        blank = {(0.5, 16)} if sizes[model, steps] == 16 else set()
        assert cells - surface.values.keys() == blank
        for method, cell in (("baseline", paper.BASELINE_CELL), ("tst", (0.3, 6))):
            printed = RUNS[f"{model}-{steps // 1000}k-{method}"].scores[task]
            assert surface.at(cell) == pytest.approx(printed, abs=0.0501)
        assert surface.values[surface.best] == max(surface.values.values())


def test_cells_of_the_score_tables():
    hellaswag = paper.nearest_surface(270_000_000, 20_000, "power_law", "hellaswag")
    assert (hellaswag.model, hellaswag.baseline, hellaswag.best) == ("270M", 36.34, (0.3, 5))
    assert (hellaswag.at((0.3, 5)), hellaswag.at((0.5, 16))) == (39.35, None)
    piqa = paper.nearest_surface(500_000_000, 1_000, "uniform", "piqa")
    assert (piqa.model, piqa.baseline, piqa.best, piqa.at(piqa.best)) == (
        *("600M", 69.04, (0.4, 10), 71.98),
    )
    boolq = paper.nearest_surface(200_000_000, 100_000, "uniform", "boolq")
    assert (boolq.steps, boolq.baseline, boolq.at((0.9, 2))) == (100_000, 58.47, 61.62)


def test_nearest():
    assert paper.nearest_model(400_000_000) == "600M"
    assert paper.nearest_model(8_000_000_000) == "10B-A1B"
    nearest = paper.nearest_surface(270_000_000, 80_000, "uniform")
    assert (nearest.model, nearest.steps) == ("270M", 100_000)
    nearest = paper.nearest_surface(3_000_000_000, 80_000, "power_law")
    assert (nearest.model, nearest.weighting) == ("600M", "power_law")
    assert not math.isnan(nearest.baseline)


def test_the_documented_table_is_the_plans():
    text = (ROOT / "docs" / "paper.md").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", text, re.MULTILINE))
    assert list(rows) == list(RUNS)
    for name, row in rows.items():
        run, (config, plan) = RUNS[name], plan_of(name)
        (first, *recovery), hours = (
            plan.stages,
            plan.gpu_hours(GPUS["B200"], mfu_of_paper(config, plan)),
        )
        assert [cell.strip() for cell in row.split("|")] == [
            f"{plan.ranks}",
            f"{plan.steps:,}",
            f"{first.steps:,}" if recovery else "",
            f"{first.stage.bag_size}" if recovery else "",
            f"{plan.data_tokens / 1e9:,.1f}B",
            run.total_tokens,
            f"{hours:,.0f}",
            f"{run.b200_hours:,.0f}",
            f"{run.final_loss}",
        ]
