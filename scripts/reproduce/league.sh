#!/usr/bin/env bash
# Every estimator on every task, at least 8 seeds, then the comparison. Resumes where it stopped.
# usage: [JOBS=1] [SEEDS=8] scripts/reproduce/league.sh [OUT] [options of league.py, as --rates]
set -euo pipefail
out=${1:-runs/league}
shift || true
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}
"${PYTHON:-python}" scripts/reproduce/league.py "$out" --jobs "${JOBS:-1}" --seeds "${SEEDS:-8}" "$@"
