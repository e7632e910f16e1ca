#!/usr/bin/env bash
# Install Slurm and munge on a Debian or Ubuntu machine that lacks them, as root.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
for program in slurmctld slurmd sbatch munged; do
    if ! command -v "$program" >/dev/null; then
        apt-get update -qq && apt-get install -qq -y --no-install-recommends slurm-wlm munge
        exit
    fi
done
