#!/usr/bin/env bash
# Launch a training job on this machine.
#
#   ./run_train.sh                                      the demo: corpus, training, loss curve
#   CONFIG_FILE=job.toml NGPU=8 ./run_train.sh [ARGS]   a job; ARGS such as --training.steps 100
#
#   CONFIG_FILE  TOML file of the job, by default the demo's. Or use --job.config_file JOB.toml
#   NGPU         processes to start; by default one for each GPU, or 2 on CPU
#   LOG_RANK     ranks whose output is shown, such as 0,1; by default 0
#   TRAIN_FILE   the module to run; by default torchtitan.experiments.tst.train
#   COMM_MODE    fake_backend: one process simulates NGPU ranks, for a step of each stage and of
#                recovery
#
# It runs `tst train` with the variables of TorchTitan's own run_train.sh. The job is checked before
# anything is started. SIGTERM and SIGUSR1 end it (but not the demo) between two steps, with a
# checkpoint and exit code 75.
#
# Installs the package into .venv first if it is missing (scripts/venv.sh). Paths are relative to this
# folder.
set -euo pipefail
cd "$(dirname "$0")"

DEMO=$(realpath train_configs/demo)
DEFAULT_JOB=$DEMO/tst.toml
TASK=
. scripts/job.sh

if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then # help on the job's keys
    exec python -m "$TRAIN_FILE" "$@"
fi
if [[ $CONFIG_FILE == "$DEMO"/* ]]; then # 64 sequences a step on any number of processes
    while ((64 % NGPU)); do NGPU=$((NGPU - 1)); done
    echo "The demo runs on $NGPU processes"
    set -- --training.local_batch_size=$((64 / NGPU)) "$@"
fi
TRAIN=(
    python -m torchtitan.experiments.tst train "$CONFIG_FILE"
    --nproc="$NGPU" --log-rank="$LOG_RANK" --module="$TRAIN_FILE"
)
if [[ -n ${COMM_MODE:-} ]]; then
    exec "${TRAIN[@]}" "$@" --comm.mode="$COMM_MODE"
fi
[[ $CONFIG_FILE == "$DEMO"/* ]] || exec "${TRAIN[@]}" "$@"
"${TRAIN[@]}" "$@"
python -m torchtitan.experiments.tst compare --job="$CONFIG_FILE" "$@"
