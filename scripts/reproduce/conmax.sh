#!/usr/bin/env bash
# ConMax on solutions with detours: cold start, RL, its two controls, data sets, and students on equal numbers of traces.
# Resumes where it stopped. OUT holds a file per piece of a seed.
# usage: [SEEDS=3] scripts/reproduce/conmax.sh [OUT] [options of conmax.py, as --pieces rl,random]
set -euo pipefail
out=${1:-runs/conmax}
shift || true
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}
"${PYTHON:-python}" scripts/reproduce/conmax.py "$out" --seeds "${SEEDS:-3}" "$@"
