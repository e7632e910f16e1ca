# shellcheck shell=bash
# Sourced by run_train.sh and the batch scripts, in the repository root: the settings of a job that
# CONFIG_FILE names, its Python, and the demo's corpus if it reads that.

CONFIG_FILE=$(realpath "$CONFIG_FILE")
export LOG_RANK=${LOG_RANK:-0}
TRAIN_FILE=${TRAIN_FILE:-torchtitan.experiments.tst.train}

. scripts/venv.sh demo

if [[ -z ${NGPU:-} ]]; then
    NGPU=$(python -c "import torch; print(torch.accelerator.device_count() or 2)")
fi

if grep -qs outputs/demo/corpus "$CONFIG_FILE"; then
    mkdir -p outputs
    exec 9>outputs/.demo.lock # one at a time, where several jobs start
    ! command -v flock >/dev/null || flock 9
    python scripts/make_demo_corpus.py outputs/demo/corpus
    if ! grep -qs '"complete": true' outputs/demo/corpus/tokens/corpus.json; then
        python scripts/tokenize_corpus.py outputs/demo/corpus/train.jsonl \
            outputs/demo/corpus/tokens --tokenizer outputs/demo/corpus/tokenizer
    fi
    exec 9>&-
fi

# less fragmentation of GPU memory
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
