#!/usr/bin/env bash
# The quickstart on five seeds, two at a time with one thread each.   usage: scripts/reproduce/quickstart_seeds.sh [OUT]
set -euo pipefail
out=${1:-runs/quickstart_seeds}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}
seq 0 4 | xargs -P 2 -I SEED python -m rltrain.train +experiment=quickstart seed=SEED run_dir="$out/seed_SEED"
python scripts/reproduce/plot.py "$out/curves.png" "$out"/seed_*
