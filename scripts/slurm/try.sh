#!/usr/bin/env bash
# Try the batch scripts: start a Slurm cluster of two nodes on this machine, run jobs, stop it.
#
#   scripts/slurm/try.sh [ARGUMENTS OF PYTEST]
#
# Needs root. Installs Debian's slurm-wlm and munge if they are missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
((EUID == 0)) || { echo "scripts/slurm/try.sh needs root: run it as root" >&2 && exit 1; }
scripts/slurm/install.sh
exec scripts/test.sh tests/test_slurm.py tests/test_slurm_submission.py tests/test_slurm_evaluation.py \
    -m slow "$@"
