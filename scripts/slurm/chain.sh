#!/usr/bin/env bash
# The two phases as two jobs: superposition, and recovery once that has ended well.
#
#   CONFIG_FILE=JOB.toml SBATCH_OPTIONS="--nodes=8 --gpus-per-node=8" scripts/slurm/chain.sh [ARGS]
#
# Both take the settings and arguments of scripts/slurm/train.sbatch, and
#   SBATCH_OPTIONS     options of both jobs
#   RECOVERY_OPTIONS   further options of the second, such as another number of nodes
#   RECOVERY_ARGS      further arguments of the second
# One job runs both phases too; two can have their own nodes, limits and places in the queue.
set -euo pipefail
cd "$(dirname "$0")/../.."
submit() { # OPTIONS...: prints the job's number
    # shellcheck disable=SC2086 # options, not one word
    sbatch --parsable ${SBATCH_OPTIONS:-} "$@" | cut -d';' -f1
}
first=$(submit --job-name=tst-superposition scripts/slurm/train.sbatch \
    --superposition.stop_at_boundary "$@")
trap 'scancel "$first"' ERR # not one without the other
# shellcheck disable=SC2086 # options and arguments, not one word
second=$(submit --job-name=tst-recovery --dependency="afterok:$first" --kill-on-invalid-dep=yes \
    ${RECOVERY_OPTIONS:-} scripts/slurm/train.sbatch "$@" ${RECOVERY_ARGS:-})
echo "$first $second"
