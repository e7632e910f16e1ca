#!/usr/bin/env bash
# Check whether this software is right and fast on a machine with one GPU or more.
#
#   scripts/check_gpu.sh                      into outputs/check_gpu; 9 minutes at most
#   scripts/check_gpu.sh --parts loss memory  some parts only
#   scripts/check_gpu.sh --tiny               the same commands with tiny shapes, also without a GPU
#   scripts/check_gpu.sh --help
#
# Exits with the number of parts that failed or fell short of a target. PYTHON names the interpreter,
# by default python3. One that has the package is used as it is, also if it finds it by PYTHONPATH
# only; else the package is installed into .venv first.
set -euo pipefail
PYTHON=$(command -v "${PYTHON:-python3}")
[[ $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
cd "$(dirname "$0")/.."
if ! (cd / && "$PYTHON" -c "import torchtitan.experiments.tst") 2>/dev/null; then # here, a part of it can always be imported
    . scripts/venv.sh dev
    PYTHON=python
fi
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
exec "$PYTHON" scripts/check_gpu.py "$@"
