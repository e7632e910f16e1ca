#!/usr/bin/env bash
# Check whether this software is correct and fast on a machine with one or more GPUs.
#
#   scripts/check_gpu.sh                      all parts, to outputs/check_gpu; at most 9 minutes
#   scripts/check_gpu.sh --parts loss memory  some parts only
#   scripts/check_gpu.sh --tiny               the same commands with tiny shapes, also without a GPU
#   scripts/check_gpu.sh --help
#
# The exit code is the number of parts that failed or missed a target. PYTHON is the interpreter, by
# default python3. If it has the package, even by PYTHONPATH only, it is used as it is. Otherwise the
# package is installed into .venv first.
set -euo pipefail
PYTHON=$(command -v "${PYTHON:-python3}")
[[ $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
cd "$(dirname "$0")/.."
if ! (cd / && "$PYTHON" -c "import torchtitan.experiments.tst") 2>/dev/null; then # in this folder, a part of it could be imported
    . scripts/venv.sh dev
    PYTHON=python
fi
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
exec "$PYTHON" scripts/check_gpu.py "$@"
