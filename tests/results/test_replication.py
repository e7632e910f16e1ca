"""scripts/replicate.py: what it runs, what it refuses, and what goes into the CSV files."""

import json
import os
from dataclasses import replace

import pytest
import tomli
import tomli_w

import replicate
from jobs import ROOT
from replication import analysis, pages, records, sweeps
from torchtitan.experiments.tst.planning.sweep import BAG_SIZE, STEP_RATIO, make


def write_metrics(folder, toml, steps, loss, data_tokens):
    """A run's folder, as far as it is read."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(tomli_w.dumps(toml))
    line = {
        "step": steps,
        "phase": "recovery",
        "loss_metrics/global_avg_loss": 1.0,
        "tflops": 1.0,
        "throughput(tps)": 1e6,
        "time_metrics/end_to_end(s)": 0.5,
        "n_tokens_seen": data_tokens,
        "n_latents_seen": 100,
    }
    first = line | {"step": 1, "n_tokens_seen": 1, "n_latents_seen": 1}
    validation = {"step": steps, "validation_metrics/loss": loss}
    lines = [json.dumps(each) + "\n" for each in (first, line, validation)]
    (folder / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture
def sweep():
    return sweeps.Sweep(
        "bag_size", {BAG_SIZE: ["1", "[8,4]"], "debug.seed": ["0", "1"]}, (f"--{STEP_RATIO}=0.3",)
    )


def test_what_runs_leave_is_gathered(tmp_path, sweep):
    folder, output = tmp_path / "sweeps", tmp_path / "out"
    points = make(folder / "bag_size" / "program", sweep.base, sweep.vary, [*sweep.arguments])
    steps = tomli.loads((ROOT / sweep.base).read_text())["training"]["steps"]
    for number, point in enumerate(points[:3]):  # the fourth has not been run
        run = folder / "bag_size" / "program" / "runs" / point.name
        write_metrics(run, point.toml, steps, 3.0 + number, 100 * (number + 1))
    elsewhere = replace(page_record(), run="bag_size/program/of another machine")
    records.write(output, [elsewhere], {elsewhere.run: {1: 5.0}})
    for _ in range(2):  # a second time changes nothing
        replicate.gather("bag_size/program", "program", folder, output)
        found = sorted(records.read_records(output / records.RUNS_CSV), key=lambda run: run.loss)
        assert [record.loss for record in found] == [3.0, 4.0, 5.0, elsewhere.loss]
        assert [record.seed for record in found] == [0, 1, 0, elsewhere.seed]
        assert [record.data_tokens for record in found[:3]] == [100, 200, 300]
        assert found[0].hours == pytest.approx(steps / 2 / 3600)
        assert found[2].stages == f"8x{round(0.15 * steps)} 4x{round(0.15 * steps)}"
        assert found[3] == elsewhere
    lead = analysis.Results(found).lead(found[2].recipe, found[0].recipe, [0, 1])
    assert lead.differences == {0: -2}
    losses = records.read_losses(output / records.CURVES_CSV)
    assert losses["bag_size/program/baseline,seed=1"] == {steps: 4.0}


def page_record():
    """Some record."""
    return records.Record(
        **vars(pages.recipe()),
        run="",
        seed=7,
        parameters=1,
        latents=1,
        data_tokens=1,
        loss=9.0,
        hours=1.0,
    )


def test_a_run_without_its_last_validation(tmp_path, sweep, capsys):
    """It was killed between the last step and the validation after it."""
    folder, output = tmp_path / "sweeps", tmp_path / "out"
    (point, *_) = make(folder / "bag_size" / "program", sweep.base, sweep.vary, sweep.arguments)
    run = folder / "bag_size" / "program" / "runs" / point.name
    write_metrics(run, point.toml, point.steps, 3.0, 100)
    *lines, _ = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines))
    replicate.gather("bag_size/program", "program", folder, output)
    assert records.read_records(output / records.RUNS_CSV) == []
    said = capsys.readouterr().out
    assert f"{point.name} is skipped: it stopped before its last validation" in said
    assert f"To run it again, delete {run}" in said


@pytest.fixture
def ran(monkeypatch):
    """List the names that each sweep is told to skip, instead of training."""
    skipped = []
    monkeypatch.setattr(replicate, "make_if_read", lambda config: None)
    monkeypatch.setattr(replicate, "run_unfinished", lambda *_, skip: skipped.append(skip))
    return skipped


def test_recorded_runs_are_not_made_again(tmp_path, sweep, ran):
    """Under whatever name they were recorded; a run on another corpus is another run."""
    folder, output = tmp_path / "sweeps", tmp_path / "out"
    known = replace(page_record(), run="lr/program/some name", seed=1)
    other = replace(page_record(), run="bag_size/program/baseline,seed=0", seed=0, corpus="prose")
    records.write(output, [known, other], {})
    replicate.run([sweep], folder, output, 1)
    assert ran == [{"baseline,seed=1"}]


@pytest.fixture
def prose(tmp_path, monkeypatch):
    """A sweep of one run, whose corpus is missing."""
    missing = sweeps.Corpus(str(tmp_path / "no"), "make it so")
    monkeypatch.setitem(sweeps.CORPORA, "prose", missing)
    prose = sweeps.Sweep("prose", {BAG_SIZE: ["1"]}, corpora=("prose",))
    monkeypatch.setattr(replicate, "SWEEPS", [prose])
    monkeypatch.setattr(replicate, "ON_CPU", ["prose"])
    return prose


def test_a_corpus_that_is_missing(tmp_path, sweep, prose, ran, run_script, monkeypatch):
    """It is missed before the first run of all sweeps, and only by a run that is missing."""
    monkeypatch.setattr(replicate, "SWEEPS", [sweep, prose])
    monkeypatch.setattr(replicate, "ON_CPU", ["bag_size", "prose"])
    options = ("--output", tmp_path / "out", "--folder", tmp_path / "sweeps")
    ended = run_script("replicate", *options)
    assert ended.code == 2
    assert "is missing. Make it with `make it so`" in ended.stderr
    assert not ran
    record = replace(page_record(), corpus="prose", run="prose/prose/baseline", seed=0)
    records.write(tmp_path / "out", [record], {})
    assert run_script("replicate", *options).code == 0
    assert ran == [set(), {"baseline"}]


def write_corpus(folder, tokens, complete=True):
    (folder / "tokens").mkdir(parents=True, exist_ok=True)
    content = {"settings": {"tokenizer": "tokenizer (xxh3 4567)"}, "complete": complete}
    content |= {"tokens": tokens} if complete else {}
    (folder / "tokens" / "corpus.json").write_text(json.dumps(content))


def test_a_corpus_that_is_not_whole(tmp_path, prose, ran):
    write_corpus(tmp_path / "no", 0, complete=False)
    with pytest.raises(ValueError, match=r"is missing\. Make it with `make it so`"):
        replicate.run([prose], tmp_path / "sweeps", tmp_path / "out", 1)


def test_runs_on_another_corpus_are_refused(tmp_path, sweep, ran, monkeypatch):
    """Another Python has another standard library."""
    folder, output, corpus = tmp_path / "sweeps", tmp_path / "out", tmp_path / "corpus"
    monkeypatch.setitem(sweeps.CORPORA, "program", sweeps.Corpus(str(corpus)))
    monkeypatch.setattr(replicate, "make_if_read", lambda config: write_corpus(corpus, 200))
    record = replace(page_record(), run="lr/program/baseline", corpus_id="0123-100")
    records.write(output, [record], {})
    with pytest.raises(
        ValueError, match=r"'program' is 4567-200 here .* but 0123-100 in .*--output"
    ):
        replicate.run([sweep], folder, output, 1)
    assert not ran
    assert records.read_records(output / records.RUNS_CSV) == [record]


def test_a_sweep_goes_on_with_its_corpus_alone(tmp_path, prose, ran):
    """The record of a run names the corpus that it read, and not what is there later."""
    folder, output, corpus = tmp_path / "sweeps", tmp_path / "out", tmp_path / "no"
    write_corpus(corpus, 100)
    replicate.run([prose], folder, output, 1)
    assert ran == [set()]
    write_corpus(corpus, 200)
    with pytest.raises(ValueError, match=r"'prose' is 4567-200 here .* but 4567-100 in"):
        replicate.run([prose], folder, output, 1)
    sweep_folder = folder / "prose" / "prose"
    toml = tomli.loads((sweep_folder / "0.toml").read_text())
    write_metrics(sweep_folder / "runs" / "baseline", toml, toml["training"]["steps"], 3.0, 100)
    replicate.gather("prose/prose", "prose", folder, output)
    (record,) = records.read_records(output / records.RUNS_CSV)
    assert record.corpus_id == "4567-100"


def test_a_run_of_two_sweeps_is_made_once(tmp_path, prose, monkeypatch):
    """Also where both are yet to be made."""
    write_corpus(tmp_path / "no", 100)
    made = []

    def run_them(folder, *_, skip):
        names = {run["name"] for run in json.loads((folder / "sweep.json").read_text())["runs"]}
        made.append(names - skip)
        for name in names - skip:
            toml = tomli.loads((folder / "0.toml").read_text())
            write_metrics(folder / "runs" / name, toml, toml["training"]["steps"], 3.0, 100)

    monkeypatch.setattr(replicate, "run_unfinished", run_them)
    both = [prose, replace(prose, name="again")]
    replicate.run(both, tmp_path / "sweeps", tmp_path / "out", 1)
    assert made == [{"baseline"}, set()]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--report", "--training.steps=20"], "--training.steps=20: --report trains nothing"),
        (["--training.steps=500"], "Give another --folder and another --output"),
        (["--optimizer.lr", "1", "--folder", "F"], "Give another --folder and another --output"),
        (["--folder=F", "--output=O", "--debug.seed=3"], "the sweep bag_size varies debug.seed"),
        (
            ["--folder=F", "--output=O", "--training.steps=120"],
            "bag_size/program: the last validation is after step 1 of 120",
        ),
        (
            ["--folder=F", "--output=O", "--validation.no-enable"],
            "bag_size/program: the last validation is after step 0 of 3000",
        ),
    ],
)
def test_arguments_that_give_no_results(
    tmp_path, sweep, ran, run_script, monkeypatch, arguments, error
):
    monkeypatch.setattr(replicate, "SWEEPS", [sweep])
    monkeypatch.setattr(replicate, "ON_CPU", ["bag_size"])
    arguments = [
        a.replace("=F", f"={tmp_path}/F").replace("=O", f"={tmp_path}/O") for a in arguments
    ]
    ended = run_script("replicate", *arguments)
    assert ended.code == 2
    assert error in ended.stderr
    assert not ran


def test_the_csv_file_is_replaced_whole(tmp_path, monkeypatch):
    record = replace(page_record(), run="lr/program/baseline")
    records.write(tmp_path, [record], {record.run: {1: 5.0}})
    monkeypatch.setattr(records.csv.DictWriter, "writerows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        records.write(tmp_path, [record, record], {})
    assert records.read_records(tmp_path / records.RUNS_CSV) == [record]


@pytest.mark.slow
def test_the_gpu_runs_on_cpu(tmp_path, corpus, tokens, monkeypatch, run_script):
    """Every step of the GPU replication, with a smaller model, batch and number of steps."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, target in (
        ("tokenizer", corpus / "tokenizer"),
        ("tokens", tokens),
        ("validation.jsonl", corpus / "validation.jsonl"),
    ):
        (folder / name).symlink_to(target)
    monkeypatch.setitem(sweeps.CORPORA, "packages", sweeps.Corpus(os.path.relpath(folder, ROOT)))
    (gpu,) = (sweep for sweep in sweeps.SWEEPS if sweep.name == "gpu")
    gpu = replace(gpu, vary=gpu.vary | {sweeps.SEED: ["0"]})
    monkeypatch.setattr(replicate, "SWEEPS", [gpu])
    small = [
        "--model.flavor=demo",
        "--training.steps=20",
        "--training.seq_len=32",
        "--training.local_batch_size=4",
        "--training.global_batch_size=4",
        "--validation.seq_len=32",
        "--validation.local_batch_size=4",
        "--validation.steps=2",
        "--validation.freq=10",
        "--metrics.log_freq=5",
        "--checkpoint.interval=10",
    ]
    made = run_script(
        "replicate",
        "--only",
        "gpu",
        "--folder",
        tmp_path / "sweeps",
        "--output",
        tmp_path / "out",
        *small,
    )
    assert made.code == 0, made.stderr
    found = records.read_records(tmp_path / "out" / records.RUNS_CSV)
    latents = 20 * 4 * 32
    assert {(run.stages, run.latents, run.data_tokens) for run in found} == {
        ("", latents, latents),
        ("4x6", latents, latents + 3 * 6 * 4 * 32),
        ("8x6", latents, latents + 7 * 6 * 4 * 32),
    }
