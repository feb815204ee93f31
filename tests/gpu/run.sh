#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and under nine minutes:
#   bash tests/gpu/run.sh one            one GPU: bits, quickstart-size and 1B runs, resume
#   bash tests/gpu/run.sh two            two GPUs: tensor, data and pipeline parallelism over NCCL
#   bash tests/gpu/run.sh one --device cpu --parts bits,tiny     the same script on a CPU, much smaller
# Logs, results.json and table.txt go to ${OUT:-runs/gpu}. Needs torch and megatron-core, no installation.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${METIS_PYTHON:-python3}" tests/gpu/check_gpu.py "$@"
