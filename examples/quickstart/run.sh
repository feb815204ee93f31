#!/usr/bin/env bash
# The whole product on this machine: corpus, tokenizer, data, then the same tiny LLaMA in each recipe, compared.
#
#     bash examples/quickstart/run.sh [--steps N] [--seed S] [--recipes bf16,nvfp4,metis]
#                                     [--corpus DIR_OR_FILES...] [--output runs/quickstart] [-- TRAINER OPTIONS]
#
# Needs Python 3.10 to 3.12 and nothing else; makes `.venv` in the clone (METIS_PYTHON=PATH uses that one instead).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../../tools/setup_venv.sh"
metis_setup_venv plots
exec "$METIS_PY" "$METIS_ROOT/examples/quickstart/quickstart.py" "$@"
