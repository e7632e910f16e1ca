# shellcheck shell=bash
# Sourced by the scripts of this folder: the environment of a job, options in a variable, requeueing.

# sbatch --export=NAME=VALUE or NONE removes these from a job, and srun would remove more on its nodes
export PATH HOME=${HOME:-~} SLURM_EXPORT_ENV=ALL
unset SRUN_EXPORT_ENV
_environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [[ -n $_environment && :$PATH: != *:"$_environment/bin":* ]]; then
    PATH=$_environment/bin:$PATH # with --export=VIRTUAL_ENV
fi
unset _environment

# Split a text at its spaces, as a shell does: "--nodes=2 --output='my job.out'" is two options.
split() { # ARRAY TEXT
    local lines # and a dot, because $() removes newlines at the end
    lines=$(xargs -r printf '%s\n' <<<"$2" 2>/dev/null && echo .) ||
        { echo "$2: a quote is not closed. Close it" >&2 && exit 2; }
    mapfile -t "$1" < <(printf %s "${lines%.}")
}

# Queue this job again, which ends it. Returns if the job is cancelled, or if Slurm does not answer.
requeue() { # MESSAGE
    local job=$SLURM_JOB_ID state
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then # the last task's job ID is that of the whole array
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    for _ in {1..10}; do # try again: a busy Slurm does not always answer
        state=$(squeue --noheader --jobs="$job" --format=%T || echo unknown)
        if [[ $state != RUNNING && $state != unknown ]]; then
            return # cancelled; or preempted, and Slurm itself requeues the job
        fi
        echo "$1"
        scontrol requeue "$job" && sleep 60 # meanwhile Slurm ends this start
        sleep 5
    done
}
