#!/usr/bin/env bash
# Run the tests, installing what they need into .venv first. Arguments go to pytest:
#   scripts/test.sh tests/core        one folder
#   scripts/test.sh -m slow           the tests that take minutes
#   scripts/test.sh -m gpu            the tests that need a GPU
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh dev
exec python -m pytest "$@"
