#!/usr/bin/env bash
# Run the tests, installing what they need into .venv first. Arguments go to pytest:
#   scripts/test.sh                   all quick tests, in as many processes as there are cores, 4 at most
#   scripts/test.sh tests/core        one folder, one test at a time; more with -n 2
#   scripts/test.sh -m slow           the tests that take minutes
#   scripts/test.sh -m gpu            the tests that need a GPU
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh dev
parallel=(-n auto --maxprocesses=4 --dist=worksteal)
for argument; do # not in parallel if some tests are chosen
    [[ $argument != -[mk]* && ! -e ${argument%%::*} ]] || parallel=()
done
exec python -m pytest "${parallel[@]}" "$@"
