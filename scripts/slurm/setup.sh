# shellcheck shell=bash
# Sourced by the scripts of this folder: the environment of a job, and options in a variable.

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
