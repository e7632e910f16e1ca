#!/usr/bin/env bash
# Run the tests, installing what they need into .venv first. Arguments go to pytest:
#   scripts/test.sh                   all quick tests, in as many processes as there are cores, 4 at most
#   scripts/test.sh tests/core        one folder, one test at a time; more with -n 2
#   scripts/test.sh -m slow           the tests that take minutes
#   scripts/test.sh -m gpu            the tests that need a GPU
#   scripts/test.sh --engine 0.3      the tests of the code for TorchTitan 0.3, which are in tests/titan03
#
# With --engine 0.3, TorchTitan 0.3 is installed into .venv-titan03, which needs Python 3.11. The tests
# that compare the two versions also use .venv: TST_PYTHON_02 is its Python.
set -euo pipefail
cd "$(dirname "$0")/.."

engine=0.2 arguments=()
while (($#)); do
    case $1 in
    --engine) engine=${2-} && shift ;;
    --engine=*) engine=${1#*=} ;;
    *) arguments+=("$1") ;;
    esac
    (($# == 0)) || shift
done
[[ $engine == 0.[23] ]] || {
    echo "--engine ${engine:-without a value}: must be 0.2 or 0.3" >&2
    exit 2
}

parallel=(-n auto --maxprocesses=4 --dist=worksteal) chosen=
for argument in "${arguments[@]}"; do # not in parallel if some tests are chosen
    [[ $argument != -[mk]* && ! -e ${argument%%::*} ]] || parallel=()
    [[ ! -e ${argument%%::*} ]] || chosen=1
    [[ $engine == 0.3 || $argument != tests/titan03* ]] || {
        echo "$argument needs TorchTitan 0.3: add --engine 0.3" >&2
        exit 2
    }
done

if [[ $engine == 0.2 ]]; then
    . scripts/venv.sh dev
else
    TST_PYTHON_02=$(set -e && . scripts/venv.sh dev >&2 && command -v python)
    export TST_PYTHON_02
    . scripts/venv.sh titan03-dev
    [[ -n $chosen ]] || arguments+=(tests/titan03)
fi
exec python -m pytest "${parallel[@]}" "${arguments[@]}"
