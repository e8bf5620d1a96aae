#!/usr/bin/env bash
# Resolves what `make venv` would install, for a machine without a GPU and for one with a GPU, and installs nothing.
#
#   scripts/check_install.sh [PYTHON]          needs the network; PYTHON (.venv/bin/python) has pip >= 23
#
# An index that serves no separate metadata makes pip download the wheels, 2.8 GB for CUDA. tests/unit/test_install.py
# checks without a network how a build is chosen.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/install_torch.sh
. scripts/install_torch.sh
python=${1:-.venv/bin/python}
version=$(sed -n 's/^torch==//p' requirements.lock)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

resolve() { # NAME BUILD
    constraints_beside requirements.lock "$2" >"$scratch/constraints.txt"
    if ! "$python" -m pip install --dry-run --ignore-installed --quiet --quiet --report "$scratch/report.json" \
        --constraint "$scratch/constraints.txt" "$2" --editable '.[dev]'; then
        echo "$1: $2 does not resolve"
        return 1
    fi
    "$python" - "$1" "$scratch/report.json" <<'EOP'
import json, sys
name, report = sys.argv[1:]
found = [package["metadata"] for package in json.load(open(report))["install"]]
versions = {package["name"].lower(): package["version"] for package in found}
print(f"{name}: {len(versions)} packages, torch {versions['torch']}, triton {versions.get('triton', 'none')}")
EOP
}

failed=0
resolve "no GPU" "torch==$version+cpu" || failed=1
resolve "GPU" "torch===$version" || failed=1
exit "$failed"
