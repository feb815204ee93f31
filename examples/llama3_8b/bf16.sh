#!/usr/bin/env bash
# LLaMA-3 8B, one of three runs that differ in the recipe alone; settings and their defaults are in common.sh.
set -euo pipefail
RUN_NAME=bf16
RECIPE_OPTIONS=(--recipe bf16)
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
