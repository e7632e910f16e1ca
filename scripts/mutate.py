"""Check the quick tests: put faults into the package, one at a time, and see which are caught.

For each fault of tests/faults.toml, it copies the repository, changes a line in the copy, and runs
the quick tests there until one fails. Tests that are likely to fail run first. It prints the test
that caught each fault and writes a JSON file. The exit code is the number of faults that were not
caught. Write a test for each fault that survives.

    python scripts/mutate.py                          all faults, two at a time
    python scripts/mutate.py --only losses boundary   faults with one of the words in module or name

To add a fault, add an entry to tests/faults.toml:

    [[fault]]
    name = "bags are added up"
    file = "core/embedding.py"
    find = 'mean = F.embedding_bag(bags, self.weight, mode="mean")'
    replace = 'mean = F.embedding_bag(bags, self.weight, mode="sum")'
    first = ["tests/core/test_embedding.py", "-k", "mean"]

`first` has pytest's arguments for the tests that run first. By default these are the test files
named after the module.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import tomli

from command_line import documented_parser
from torchtitan.experiments.tst.testing.processes import signal_tree

ROOT = Path(__file__).parent.parent
FAULTS = ROOT / "tests" / "faults.toml"
PACKAGE = Path("torchtitan/experiments/tst")

# sitecustomize.py of a copy: it makes Python find the package in the copy, wherever it is installed
SITE = f"""\
import sys
from importlib.util import spec_from_file_location
from pathlib import Path

INIT = Path(__file__).parent.parent / "{PACKAGE}" / "__init__.py"


class OfCopy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchtitan.experiments.tst":
            return spec_from_file_location(name, INIT)


sys.meta_path.insert(0, OfCopy)
"""


@dataclass(frozen=True)
class Fault:
    """A fault: a text of the package and its wrong replacement.

    Attributes:
        name: what the replacement does wrong.
        file: the module, relative to the package.
        find: a text that the module has exactly once.
        replace: the text that replaces it.
        first: pytest's arguments for the tests that are likely to catch it.
    """

    name: str
    file: str
    find: str
    replace: str
    first: Sequence[str] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of the tests on one fault.

    Attributes:
        fault: the fault.
        caught_by: the first test that failed; "" if none did.
        seconds: time until then.
        not_known: why it is unknown whether a test fails; "" if it is known.
    """

    fault: Fault
    caught_by: str
    seconds: float
    not_known: str = ""

    def __str__(self) -> str:
        if self.not_known:
            return f"NOT KNOWN: {self.not_known}"
        return self.caught_by or "SURVIVES"


def read_faults(path: Path, words: Sequence[str] = ()) -> list[Fault]:
    """Read the faults of a file that have one of the words in module or name.

    Args:
        path: the TOML file.
        words: words to look for; without any, all faults are read.

    Raises:
        ValueError: if a module does not have the fault's text exactly once.
    """
    faults = [Fault(**fault) for fault in tomli.loads(path.read_text())["fault"]]
    for fault in faults:
        found = (ROOT / PACKAGE / fault.file).read_text().count(fault.find)
        if found != 1 or fault.find == fault.replace:
            raise ValueError(
                f"{path.name}, {fault.name!r}: {fault.file} has `find` {found} times. It must "
                "have it once, and `replace` must differ"
            )
    return [f for f in faults if not words or any(word in f"{f.file} {f.name}" for word in words)]


def copy_repository(folder: Path) -> None:
    """Copy all files that git tracks or does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    site = folder / ".site" / "sitecustomize.py"
    site.parent.mkdir()
    site.write_text(SITE)


def first_tests(fault: Fault, tests: Path) -> list[str]:
    """Return the arguments of pytest for the tests that run before all others."""
    stem = Path(fault.file).stem
    named = [str(path) for path in tests.rglob("test_*.py") if stem in path.stem]
    return [*fault.first] or sorted(named)


def try_fault(fault: Fault, limit: float) -> Outcome:
    """Run the quick tests on a copy with the fault, for at most ``limit`` seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_repository(folder)
        module = folder / PACKAGE / fault.file
        module.write_text(module.read_text().replace(fault.find, fault.replace))
        for selection in filter(None, [first_tests(fault, folder / "tests"), ["tests"]]):
            try:
                failed = first_failure(folder, selection, limit - (time.monotonic() - begin))
            except (subprocess.TimeoutExpired, ValueError) as error:
                out_of_time = isinstance(error, subprocess.TimeoutExpired)
                why = "the tests did not end in time" if out_of_time else str(error)
                return Outcome(fault, "", time.monotonic() - begin, why)
            if failed:
                break
    return Outcome(fault, failed, time.monotonic() - begin)


def first_failure(folder: Path, selection: list[str], limit: float) -> str:
    """Return the first test that fails in a copy, or another reason; "" if all pass.

    Raises:
        subprocess.TimeoutExpired: if they do not end in ``limit`` seconds.
        ValueError: if the selection has no tests.
    """
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        "PYTHONPATH": str(folder / ".site"),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", *selection]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, limit))
    finally:
        if process.poll() is None:
            signal_tree(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise ValueError(f"{selection} selects no tests: {output[-300:].strip()}")
    for line in output.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return line.partition(" ")[2].partition(" - ")[0]
    return "" if process.returncode == 0 else output[-300:]


def main() -> None:
    """Run from the command line."""
    parser = documented_parser(__doc__ or "")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="only faults with one of these words in module or name; default: all",
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="faults at a time; default: %(default)s"
    )
    parser.add_argument(
        "--limit", type=float, default=3600, help="seconds per fault; default: %(default)s"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/faults.json"),
        help="JSON file of the results; default: %(default)s",
    )
    args = parser.parse_args()
    try:
        faults = read_faults(FAULTS, args.only)
    except ValueError as error:
        parser.error(str(error))
    outcomes = []
    with ThreadPoolExecutor(args.jobs) as pool:
        tries = pool.map(lambda fault: try_fault(fault, args.limit), faults)
        for number, outcome in enumerate(tries, 1):
            outcomes.append(outcome)
            print(f"{number}/{len(faults)}  {outcome.fault.file}: {outcome.fault.name}", flush=True)
            print(f"      {outcome.seconds:.0f} s  {outcome}", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    caught = sum(bool(outcome.caught_by) for outcome in outcomes)
    print(f"{caught} of {len(outcomes)} faults are caught")
    sys.exit(len(outcomes) - caught)


if __name__ == "__main__":
    main()
