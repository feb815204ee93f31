#!/usr/bin/env bash
# Every property at a count that fits 15 minutes on 2 cores:   bash tests/run.sh [PYTEST ARGUMENTS]
# Full counts, with date, commit and counts appended to LOG.md: bash tests/run.sh --long [PYTEST ARGUMENTS]
#
# Makes `.venv` in the clone (METIS_PYTHON=PATH uses that one instead). The last line is pytest's own summary, the
# exit status is pytest's.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../tools/setup_venv.sh"
metis_setup_venv test
cd "$METIS_ROOT"

long=
arguments=()
for argument in "$@"; do
    if [ "$argument" = --long ]; then long=1; else arguments+=("$argument"); fi
done

# Multi-rank tests run 2 to 4 processes; more threads than one in each only get in each other's way.
export OMP_NUM_THREADS=1
# Most tests wait for processes to start, so two workers take little more than half the time; a file stays whole.
command=("$METIS_PY" -m pytest --durations=25 --durations-min=5 -n "${METIS_TEST_WORKERS:-2}" --dist loadfile
    --no-loadscope-reorder)
if [ -z "$long" ]; then
    exec "${command[@]}" -m "not long" ${arguments[@]+"${arguments[@]}"}
fi

output="$(mktemp)"
trap 'rm -f "$output"' EXIT
status=0
"${command[@]}" ${arguments[@]+"${arguments[@]}"} | tee "$output" || status=$?
{
    echo
    echo "## $(date -u +%Y-%m-%d) tests/run.sh --long${arguments[*]+ ${arguments[*]}}"
    echo
    echo "Commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo ' with changes')," \
        "$("$METIS_PY" --version), torch $("$METIS_PY" -c 'import importlib.metadata as m; print(m.version("torch"))')," \
        "$(uname -sm), $(getconf _NPROCESSORS_ONLN) cores: $(tail -n 1 "$output")"
} >>LOG.md
exit "$status"
