#!/usr/bin/env bash
# SPAE, its parts, GRPO and DAPO on redundant tails and on chains, in eight minibatches a step. Resumes where it stopped.
# usage: [SEEDS=5] [JOBS=1] scripts/reproduce/spae.sh [OUT] [options of spae.py, as --tasks tail]
set -euo pipefail
out=${1:-runs/spae}
shift || true
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}
"${PYTHON:-python}" scripts/reproduce/spae.py "$out" --seeds "${SEEDS:-5}" --jobs "${JOBS:-1}" "$@"
