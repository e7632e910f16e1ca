"""The tutorial: its commands and configs are valid, and its runner notices what is wrong."""

import shlex
import signal
import subprocess
import sys

import pytest

from jobs import ROOT
from run_tutorial import (
    PAGE,
    Commands,
    File,
    TutorialError,
    missing_lines,
    read_steps,
    run_page,
)
from torchtitan.experiments.tst.checks.job import check_config
from torchtitan.experiments.tst.commands.arguments import job_arguments, split_overrides
from torchtitan.experiments.tst.config.manager import SuperpositionConfigManager
from torchtitan.experiments.tst.config.schedule import build_schedule
from torchtitan.experiments.tst.errors import ConfigError

STEPS = read_steps(PAGE.read_text())
SMALL_PAGE = """\
# Small

Not written, because no line names a file:

```python
print("read only")
```

## 1. Install

```bash
exit 1
```

## 2. Work

The commands share folder and environment:

```bash
mkdir work
cd work; export NAME=reader
```

A paragraph may have several lines. Save this as
`greet.sh`:

```bash
echo "Hello $NAME"
```

Save this as `numbers.txt`:

```toml
first = 1
```

Add this to the end of `numbers.txt`:

```toml
second = 2
```

```bash
# a comment
cat numbers.txt \\
    numbers.txt
echo "$NAME took 3.25 s in $PWD"
```

```text
second = 7
reader took 1,000 s in .../work
```

```bash
echo "config error: wrong" >&2; false
```

```text
config error: ...
```

## 3. On GPUs

### One

```bash
exit 1
```
"""


def run(page, folder):
    return run_page(page, folder, folder / "log", reuse_environment=True)


def test_a_page_runs(tmp_path):
    run(SMALL_PAGE, tmp_path)
    work = tmp_path / "work"
    assert (work / "greet.sh").read_text() == 'echo "Hello $NAME"\n'
    assert (work / "numbers.txt").read_text() == "first = 1\nsecond = 2\n"
    assert f"reader took 3.25 s in {work}" in (tmp_path / "log").read_text()


def test_the_installation_is_run_unless_an_environment_is_reused(tmp_path):
    with pytest.raises(TutorialError, match=r"\$ exit 1\n[^$]*ended with 1: it must succeed"):
        run_page(SMALL_PAGE, tmp_path, tmp_path / "log")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (
            "echo before; false",
            r"\$ echo before; false\nbefore\n[^$]*ended with 1: it must succeed",
        ),
        ("false\necho after", r"\$ false\n[^$]*must succeed"),
        ("echo fine\n```\n\n```text\nfine\nmissing ... 3", r"page shows:\nmissing ... 3$"),
        ("true\n```\n\n```text\nerror: no", r"ended with 0: it must fail"),
    ],
)
def test_what_fails_is_reported(tmp_path, page, message):
    with pytest.raises(TutorialError, match=message):
        run(f"## 1. Try\n\n```bash\n{page}\n```\n", tmp_path)


def test_a_page_that_cannot_be_run_is_refused():
    with pytest.raises(TutorialError, match="no command is before the output 'lost"):
        read_steps("## 1. Try\n\n```text\nlost\n```\n")
    with pytest.raises(TutorialError, match="the last block has no end"):
        read_steps("## 1. Try\n\n```bash\ntrue\n")


def test_ctrl_c_is_pressed(tmp_path):
    long = "i=0; while ((i < 600)); do echo step $((++i)); sleep 0.1; done"
    page = f"```bash\n{long}\n```\n\n```text\nstep 1\nstep ...\n^C\n```\n"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    try:
        assert run(page, tmp_path) < 50
    finally:
        signal.signal(signal.SIGINT, before)


def test_numbers_and_gaps_match_any():
    output = "\x1b[31mstep:  1,200  loss:  3.26509e-1\r 50 %|##  | done\nDirty: +0.1 in /a/b\n"
    shown = ["step: 7 loss: 1", "step: ... loss: 2", "0 %| ... | done", "Dirty: -2.5 in ...b"]
    assert not missing_lines(shown, output)
    for wrong in ("step: 7 lass: 1", "loss: ... step:", "step: ... done", "Dirty: in"):
        assert missing_lines([wrong], output) == [wrong]


@pytest.fixture
def tutorial(tmp_path, monkeypatch):
    """The files of the tutorial, in the folder where its commands run."""
    monkeypatch.chdir(tmp_path)
    for step in STEPS:
        if isinstance(step, File):
            step.write(tmp_path)
        for line in getattr(step, "lines", []):
            if line.startswith("sed "):  # which makes a file of another
                subprocess.run(["bash", "-c", line], check=True)
    return tmp_path


def jobs_of(line):
    """Return the arguments of each job that a command line names."""
    own, overrides = split_overrides(shlex.split(line)[2:])
    return [job_arguments(name, overrides) for name in own if name.endswith(".toml")]


def test_jobs_are_valid(tutorial):
    schedules = set()
    for step in STEPS:
        for line in getattr(step, "lines", []):
            for arguments in jobs_of(line) if line.startswith("tst ") else []:
                if step.fails and line is step.lines[-1] and step.stops_after is None:
                    with pytest.raises(ConfigError) as error:
                        check_config(SuperpositionConfigManager().parse_args(arguments), 2)
                    assert not missing_lines(step.shown, f"config error: {error.value}")
                    continue
                job_config = SuperpositionConfigManager().parse_args(arguments)
                check_config(job_config, 2)
                schedules.add(build_schedule(job_config).enabled)
    assert schedules == {True, False}


def test_python_is_valid(tutorial):
    for path in tutorial.glob("*.py"):
        compile(path.read_text(), path, "exec")


def test_shown_steps_are_those_of_the_job():
    shown = "\n".join("\n".join(step.shown) for step in STEPS if isinstance(step, Commands))
    for text in ("steps 1 to 360", "step: 361", "checkpoint/step-360", "step: 1200"):
        assert text in shown


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    command = [sys.executable, "scripts/run_tutorial.py", "--reuse-environment"]
    result = subprocess.run(
        [*command, f"--folder={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-10_000:]
