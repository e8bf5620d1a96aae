#!/usr/bin/env bash
# The right, a random and the inverted reward from one cold start, in one picture.
# usage: scripts/reproduce/spurious_rewards.sh [OUT]
set -euo pipefail
out=${1:-runs/spurious}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}
[ -d "$out/right/cold_start" ] || python -m rltrain.sft +experiment=spurious_right run_dir="$out/right"
for control in random inverted; do
    mkdir -p "$out/$control"
    [ -d "$out/$control/cold_start" ] || cp -r "$out/right/cold_start" "$out/$control/"
done
echo right random inverted | xargs -n 1 | xargs -P 2 -I NAME \
    python -m rltrain.train +experiment=spurious_NAME run_dir="$out/NAME"
python scripts/reproduce/plot.py "$out/spurious_rewards.png" "$out"/right "$out"/random "$out"/inverted
