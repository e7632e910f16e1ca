# shellcheck shell=bash
# Sourced by run_train.sh and train.sbatch, with the arguments of a job as "$@", in the folder that
# CONFIG_FILE is relative to. Changes to the repository root and prepares the settings and the Python
# of the job.
#
# CONFIG_FILE or the argument --job.config_file names the job; by default it is DEFAULT_JOB. The
# argument is removed from "$@". If TASK is set, they name the folder of a sweep, and TASK is the number
# of a run.

_refuse() { # MESSAGE
    echo "$1" >&2
    exit 2
}
_name_job() { # PATH
    [[ -n $1 ]] || _refuse "--job.config_file: a file must follow"
    [[ -z ${CONFIG_FILE:-} || $1 == "$CONFIG_FILE" || $1 -ef $CONFIG_FILE ]] ||
        _refuse "CONFIG_FILE = $CONFIG_FILE and --job.config_file = $1: two jobs. Give only one"
    CONFIG_FILE=$1
}
_is_next=
for _argument; do
    shift
    if [[ -n $_is_next ]]; then
        _name_job "$_argument"
        _is_next=
    elif [[ $_argument =~ ^--job\.config[_-]file(=(.*))?$ ]]; then
        if [[ $_argument == *=* ]]; then _name_job "${BASH_REMATCH[2]}"; else _is_next=1; fi
    else
        set -- "$@" "$_argument"
    fi
done
[[ -z $_is_next ]] || _name_job ""

CONFIG_FILE=${CONFIG_FILE:-${DEFAULT_JOB:-}}
[[ -n $CONFIG_FILE ]] || _refuse "CONFIG_FILE is not set: name the job by CONFIG_FILE=JOB.toml, or by \
the argument --job.config_file JOB.toml, which also works with sbatch --export=NONE"
CONFIG_FILE=$CONFIG_FILE${TASK:+/$TASK.toml}
[[ -e $CONFIG_FILE ]] || _refuse "CONFIG_FILE = $CONFIG_FILE: no such file. A path is relative to \
$PWD${TASK:+; with sbatch --array, name the folder of a sweep (tst sweep make)}"
CONFIG_FILE=$(realpath "$CONFIG_FILE")
unset -f _refuse _name_job
unset _argument _is_next
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

export LOG_RANK=${LOG_RANK:-0}
TRAIN_FILE=${TRAIN_FILE:-torchtitan.experiments.tst.train}

. scripts/venv.sh demo

if [[ -z ${NGPU:-} ]]; then
    NGPU=$(python -c "import torch; print(torch.accelerator.device_count() or 2)")
fi
