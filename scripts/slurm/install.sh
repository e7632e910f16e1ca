#!/usr/bin/env bash
# Install Slurm and munge on a Debian or Ubuntu machine that has none, as root.
set -euo pipefail
if ! command -v sbatch munged >/dev/null; then
    apt-get update -qq && apt-get install -qq -y --no-install-recommends slurm-wlm munge
fi
