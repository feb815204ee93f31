# Sourced by examples/quickstart/run.sh and tests/run.sh: the Python environment of this clone.
#
#     . tools/setup_venv.sh
#     metis_setup_venv plots        # extras of pyproject.toml, comma separated
#     "$METIS_PY" ...
#
# Sets METIS_PY to an interpreter in which the project is installed: that of `.venv` in the clone, made with the
# first Python 3.10 to 3.12 found and reused while pyproject.toml stays the same. METIS_PYTHON=PATH (interpreter
# or virtual environment) uses that one as it is and installs nothing.
#
# Trap: the plain torch wheel of Linux is a CUDA build of several GB. Without an NVIDIA GPU a CPU build is looked
# for first, among the configured indexes and then in PyTorch's own.

METIS_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
METIS_CPU_TORCH="2.13.0"
METIS_CPU_INDEX="https://download.pytorch.org/whl/cpu"

metis_say() { printf '[setup] %s\n' "$*" >&2; }
metis_fail() { printf 'error: setup: %s\n' "$*" >&2; return 1; }

# True for an interpreter of a supported version that can make virtual environments.
metis_supported_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

metis_find_python() {
    local name path
    for name in python3.12 python3.11 python3.10 python3 python; do
        path="$(command -v "$name" 2>/dev/null)" || continue
        if metis_supported_python "$path"; then
            printf '%s\n' "$path"
            return 0
        fi
    done
    metis_fail "needs Python 3.10, 3.11 or 3.12 with its venv module on the PATH, found none;" \
        "install one (Debian: apt install python3 python3-venv) or set METIS_PYTHON"
}

# What the installation depends on: the declared requirements, the extras, and where the clone lies.
metis_stamp() {
    "$1" - "$METIS_ROOT" "$2" <<'PY'
import hashlib, pathlib, sys
root, extras = sys.argv[1:]
text = pathlib.Path(root, "pyproject.toml").read_bytes() + f"\0{extras}\0{root}\0{sys.version}".encode()
print(hashlib.sha256(text).hexdigest())
PY
}

metis_has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

metis_install_cpu_torch() {
    local pip=("$1" -m pip install --quiet --disable-pip-version-check)
    "$1" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null && return 0
    metis_say "no NVIDIA GPU found: installing the CPU build of torch $METIS_CPU_TORCH"
    "${pip[@]}" "torch==$METIS_CPU_TORCH+cpu" 2>/dev/null && return 0
    "${pip[@]}" --retries 1 --timeout 20 --extra-index-url "$METIS_CPU_INDEX" \
        "torch==$METIS_CPU_TORCH+cpu" 2>/dev/null && return 0
    metis_say "no CPU build found; installing torch $METIS_CPU_TORCH as it is served (may be large)"
    "${pip[@]}" "torch==$METIS_CPU_TORCH" && return 0
    metis_say "torch $METIS_CPU_TORCH is not served; pip chooses another version in the supported range"
}

metis_setup_venv() {
    local extras="$1" base stamp_file stamp
    if [ -n "${METIS_PYTHON:-}" ]; then
        METIS_PY="$METIS_PYTHON"
        [ -d "$METIS_PY" ] && METIS_PY="$METIS_PY/bin/python"
        "$METIS_PY" -c 'import torch, megatron.core' 2>/dev/null || {
            metis_fail "METIS_PYTHON must have the project's requirements (torch, megatron-core), $METIS_PY has not;" \
                "run $METIS_PY -m pip install -e '$METIS_ROOT[$extras]' or unset METIS_PYTHON"
            return 1
        }
        export PYTHONPATH="$METIS_ROOT${PYTHONPATH:+:$PYTHONPATH}"
        return 0
    fi
    METIS_PY="$METIS_ROOT/.venv/bin/python"
    if ! metis_supported_python "$METIS_PY"; then
        base="$(metis_find_python)" || return 1
        metis_say "making .venv with $("$base" --version) ($base)"
        "$base" -m venv --clear "$METIS_ROOT/.venv" || { metis_fail "could not make .venv"; return 1; }
    fi
    stamp_file="$METIS_ROOT/.venv/.installed-${extras//,/-}"
    stamp="$(metis_stamp "$METIS_PY" "$extras")" || return 1
    [ "$(cat "$stamp_file" 2>/dev/null)" = "$stamp" ] && return 0
    if ! metis_has_nvidia_gpu && [ "$(uname -s)" = Linux ]; then
        metis_install_cpu_torch "$METIS_PY"
    fi
    metis_say "installing the project with [$extras] (minutes the first time)"
    "$METIS_PY" -m pip install --quiet --disable-pip-version-check -e "$METIS_ROOT[$extras]" || {
        metis_fail "pip could not install the project; its message is above"
        return 1
    }
    printf '%s\n' "$stamp" >"$stamp_file"
    metis_say "ready: $METIS_PY"
}
