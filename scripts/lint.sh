#!/usr/bin/env bash
# Check style, types, shell scripts and the readability of the docs, as .ci/run and pre-commit do.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh dev
ruff check
ruff format --check
mypy
shellcheck run_train.sh .ci/run scripts/*.sh scripts/slurm/*
python scripts/check_docs.py
