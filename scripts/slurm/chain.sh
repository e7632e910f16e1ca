#!/usr/bin/env bash
# The two phases as two jobs: superposition, and recovery once that has ended well.
#
#   CONFIG_FILE=JOB.toml SBATCH_OPTIONS="--nodes=8 --gpus-per-node=8" scripts/slurm/chain.sh [ARGS]
#
# Both take the settings and arguments of scripts/slurm/train.sbatch, and
#   SBATCH_OPTIONS     options of both jobs
#   RECOVERY_OPTIONS   further options of the second, such as another number of nodes
#   RECOVERY_ARGS      further arguments of the second
# Quotes in these hold spaces: SBATCH_OPTIONS="--nodes=8 --output='my job.out'".
# One job runs both phases too; two can have their own nodes, limits and places in the queue.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
# shellcheck source=scripts/slurm/setup.sh
. "$here/setup.sh"
both=() options=() arguments=()
split both "${SBATCH_OPTIONS:-}"
split options "${RECOVERY_OPTIONS:-}"
split arguments "${RECOVERY_ARGS:-}"
if [[ -n ${CONFIG_FILE:-} ]]; then # as an argument, which any --export leaves in the job
    set -- --job.config_file "$CONFIG_FILE" "$@"
fi
submit() { # OPTIONS...: prints the job's number
    sbatch --parsable "${both[@]}" "$@" | cut -d';' -f1
}
first=$(submit --job-name=tst-superposition "$here/train.sbatch" \
    --superposition.stop_at_boundary "$@")
trap 'scancel "$first"' ERR # not one without the other
second=$(submit --job-name=tst-recovery --dependency="afterok:$first" --kill-on-invalid-dep=yes \
    "${options[@]}" "$here/train.sbatch" "$@" "${arguments[@]}")
echo "$first $second"
