#!/usr/bin/env bash
# Check style and types, as .ci/run and pre-commit do.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh dev
ruff check
ruff format --check
mypy
