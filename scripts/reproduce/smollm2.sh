#!/usr/bin/env bash
# SmolLM2-135M on one-operation problems, 60 GRPO steps.   usage: scripts/reproduce/smollm2.sh [OUT]
set -euo pipefail
out=${1:-runs/smollm2_randomcalc}
WANDB_MODE=${WANDB_MODE:-disabled} python -m rltrain.train +experiment=smollm2_randomcalc run_dir="$out"
python scripts/reproduce/plot.py "$out/curve.png" "$out"
