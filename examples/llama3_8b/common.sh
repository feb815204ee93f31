#!/usr/bin/env bash
# What the three runs of this folder share; sourced by bf16.sh, nvfp4.sh and metis.sh, which set RECIPE_OPTIONS.
#
#     DATA_PATH=/data/text TOKENIZER_MODEL=/data/tokenizer.model bash examples/llama3_8b/metis.sh [TRAINER OPTIONS]
#
# Every setting is an environment variable with the default below; options after the script win over all of them.
# One node of 8 GPUs by default; on more nodes start it once per node with NNODES, NODE_RANK and MASTER_ADDR.
# A job that is started again goes on from SAVE. Nothing is launched with --print-config, which needs neither GPUs
# nor data:  bash examples/llama3_8b/metis.sh --print-config

: "${RUN_NAME:?is set by bf16.sh, nvfp4.sh and metis.sh: start one of them}"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="${PYTHON:-python}"

# Ranks
NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
MASTER_PORT="${MASTER_PORT:-29500}"

# Layout: what TP x PP leaves over is data parallel
TP="${TP:-4}"
PP="${PP:-1}"

# Length and batch: 4 Mi tokens per iteration
SEQ_LENGTH="${SEQ_LENGTH:-8192}"
MICRO_BATCH_SIZE="${MICRO_BATCH_SIZE:-1}"
GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-512}"
TRAIN_ITERS="${TRAIN_ITERS:-25000}"

# Optimizer
LR="${LR:-3e-4}"
MIN_LR="${MIN_LR:-3e-5}"
LR_WARMUP_ITERS="${LR_WARMUP_ITERS:-2000}"
SEED="${SEED:-1234}"

# Data: DATA_PATH may be several prefixes, or WEIGHT PREFIX pairs
DATA_PATH="${DATA_PATH:-}"
SPLIT="${SPLIT:-99,1,0}"
TOKENIZER_TYPE="${TOKENIZER_TYPE:-HuggingFaceTokenizer}"
TOKENIZER_MODEL="${TOKENIZER_MODEL:-}"
DATA_CACHE_PATH="${DATA_CACHE_PATH:-}"

# Output
OUTPUT="${OUTPUT:-runs/llama3_8b/$RUN_NAME}"
SAVE="${SAVE:-$OUTPUT/checkpoints}"
SAVE_INTERVAL="${SAVE_INTERVAL:-500}"
KEEP_LAST_CHECKPOINTS="${KEEP_LAST_CHECKPOINTS:-3}"

OPTIONS=(
    --preset llama3-8b
    --seq-length "$SEQ_LENGTH"
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --sequence-parallel
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --bf16
    --micro-batch-size "$MICRO_BATCH_SIZE"
    --global-batch-size "$GLOBAL_BATCH_SIZE"
    --train-iters "$TRAIN_ITERS"
    --lr "$LR"
    --min-lr "$MIN_LR"
    --lr-decay-style cosine
    --lr-warmup-iters "$LR_WARMUP_ITERS"
    --seed "$SEED"
    --save "$SAVE"
    --load "$SAVE"
    --save-interval "$SAVE_INTERVAL"
    --keep-last-checkpoints "$KEEP_LAST_CHECKPOINTS"
    --async-save
    --exit-signal-handler
    --eval-interval 500
    --eval-iters 16
    --log-interval 10
    --log-throughput
    --tensorboard-dir "$OUTPUT/tensorboard"
    --metrics-file "$OUTPUT/metrics.jsonl"
    --manual-gc
    --manual-gc-interval 100
    --distributed-timeout-minutes 60
)
if [ -n "$DATA_PATH" ]; then
    # Unquoted on purpose: a blend is several words.
    # shellcheck disable=SC2206
    OPTIONS+=(--data-path $DATA_PATH --split "$SPLIT" --tokenizer-type "$TOKENIZER_TYPE")
    OPTIONS+=(--tokenizer-model "$TOKENIZER_MODEL")
fi
if [ -n "$DATA_CACHE_PATH" ]; then OPTIONS+=(--data-cache-path "$DATA_CACHE_PATH"); fi

LAUNCHER=(
    "$PYTHON" -m torch.distributed.run
    --nnodes "$NNODES"
    --node-rank "$NODE_RANK"
    --nproc-per-node "$NPROC_PER_NODE"
    --master-addr "$MASTER_ADDR"
    --master-port "$MASTER_PORT"
)
CONNECTIONS=1 # one queue of launches keeps overlapping messages in order under tensor parallelism
for option in "$@"; do
    if [ "$option" = --print-config ]; then
        # One process that only reads; it is told how many ranks there would be.
        LAUNCHER=(env "WORLD_SIZE=$((NNODES * NPROC_PER_NODE))" "$PYTHON")
    fi
    # Its copies into other GPUs' memory would wait for products in that queue, and keep their order by themselves.
    if [ "$option" = --tp-comm-overlap ]; then CONNECTIONS=8; fi
done

COMMAND=("${LAUNCHER[@]}" "$ROOT/pretrain_llama.py" "${OPTIONS[@]}" "${RECIPE_OPTIONS[@]}" "$@")
printf '%q ' "${COMMAND[@]}" >&2
printf '\n' >&2
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-$CONNECTIONS}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${COMMAND[@]}"
