#!/usr/bin/env bash
# A handbook in the prompt of a tiny model, and fine-tuning on solutions written with it (scripts/reproduce/handbook.py).
# usage: scripts/reproduce/handbook.sh [OUT] [SEEDS]     e.g. runs/handbook "1 2 3 4 5"
set -euo pipefail
out=${1:-runs/handbook}
seeds=${2:-1 2 3 4 5}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}

for seed in $seeds; do python scripts/reproduce/handbook.py "$out" --seed "$seed"; done
python scripts/reproduce/handbook.py "$out"
