#!/usr/bin/env bash
# Submit the two phases as two jobs: superposition, and recovery, which starts if the first succeeds.
#
#   CONFIG_FILE=JOB.toml SBATCH_OPTIONS="--nodes=8 --gpus-per-node=8" scripts/slurm/chain.sh [ARGS]
#
# Both jobs take the settings and arguments of scripts/slurm/train.sbatch, and these variables:
#   SBATCH_OPTIONS     options of both jobs
#   RECOVERY_OPTIONS   further options of the second job, such as another number of nodes
#   RECOVERY_ARGS      further arguments of the second job
# Quote a value with spaces: SBATCH_OPTIONS="--nodes=8 --output='my job.out'".
# A single job can run both phases, too. Two jobs can have different nodes and time limits.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
# shellcheck source=scripts/slurm/setup.sh
. "$here/setup.sh"
both=() options=() arguments=()
split both "${SBATCH_OPTIONS:-}"
split options "${RECOVERY_OPTIONS:-}"
split arguments "${RECOVERY_ARGS:-}"
if [[ -n ${CONFIG_FILE:-} ]]; then # as an argument, because --export can remove the variable
    set -- --job.config_file "$CONFIG_FILE" "$@"
fi
submit() { # OPTIONS...: prints the job's number
    sbatch --parsable "${both[@]}" "$@" | cut -d';' -f1
}
first=$(submit --job-name=tst-superposition "$here/train.sbatch" \
    --superposition.stop_at_boundary "$@")
trap 'scancel "$first"' ERR # no first job without the second
second=$(submit --job-name=tst-recovery --dependency="afterok:$first" --kill-on-invalid-dep=yes \
    "${options[@]}" "$here/train.sbatch" "$@" "${arguments[@]}")
echo "$first $second"
