#!/usr/bin/env bash
# Launch a training job on this machine.
#
#   ./run_train.sh                                      the demo: corpus, training, loss curve
#   CONFIG_FILE=job.toml NGPU=8 ./run_train.sh [ARGS]   a job; ARGS such as --training.steps 100
#
#   CONFIG_FILE  the job, TOML; by default that of the demo; --job.config_file JOB.toml names it too
#   NGPU         processes to start; by default one for each GPU, or 2 on CPU
#   LOG_RANK     ranks whose output is shown, such as 0,1; by default 0
#   TRAIN_FILE   the module to run; by default torchtitan.experiments.tst.train
#   COMM_MODE    fake_backend: one process plays NGPU ranks for a step of each phase, to check a
#                config
#
# SIGTERM and SIGUSR1 end a job (not the demo) between two steps, with a checkpoint and exit code 75:
# launched again with the same command it goes on.
#
# Installs into .venv first if need be (scripts/venv.sh). Paths are relative to this folder.
set -euo pipefail
cd "$(dirname "$0")"

DEMO=$(realpath train_configs/demo)
DEFAULT_JOB=$DEMO/tst.toml
TASK=
COMM_MODE=${COMM_MODE:-}
. scripts/job.sh

if [[ $CONFIG_FILE == "$DEMO"/* ]]; then # 64 sequences a step, on however many processes
    while ((64 % NGPU)); do NGPU=$((NGPU - 1)); done
    echo "The demo runs on $NGPU processes"
    set -- --training.local_batch_size=$((64 / NGPU)) "$@"
fi

if [[ -n $COMM_MODE ]]; then
    export NGPU RANK=0 LOCAL_RANK=0 WORLD_SIZE=$NGPU
    PLAYED=( # a rank alone has no whole model to load or save, and nothing to record
        --comm.mode="$COMM_MODE" --job.dump_folder="$(mktemp -d)" --training.steps=2
        --superposition.steps=None --superposition.step_ratio=0.5
        --superposition.no-stop_at_boundary --checkpoint.no-enable --checkpoint.load_step=-1
        --checkpoint.initial_load_path=None --checkpoint.no-initial_load_in_hf
        --checkpoint.no-create_seed_checkpoint --profiling.no-enable_profiling
        --profiling.no-enable_memory_snapshot --metrics.no-enable_wandb
    )
    python -m "$TRAIN_FILE" --job.config_file "$CONFIG_FILE" "$@" "${PLAYED[@]}"
    exit
fi

LAUNCH=(
    python -m torchtitan.experiments.tst.launch # torchrun that passes signals and exit codes on
    --nproc_per_node="$NGPU" --rdzv_backend c10d --rdzv_endpoint=localhost:0
    --local-ranks-filter "$LOG_RANK" --role rank --tee 3
    -m "$TRAIN_FILE" --job.config_file "$CONFIG_FILE"
)
if [[ $CONFIG_FILE != "$DEMO"/* || $* == *--help* ]]; then
    exec "${LAUNCH[@]}" "$@"
fi
"${LAUNCH[@]}" "$@"
python scripts/compare_runs.py --of-job --job.config_file "$CONFIG_FILE" "$@"
