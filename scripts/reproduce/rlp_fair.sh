#!/usr/bin/env bash
# RLP, next-token training and no further training from one cold start a seed, then the same GRPO steps from each.
# Resumes where it stopped, piece by piece.
# usage: [EXPERIMENT=rlp_automaton] [SEEDS=5] scripts/reproduce/rlp_fair.sh [OUT]
set -euo pipefail
out=${1:-runs/rlp_fair}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}
given=(--experiment "${EXPERIMENT:-rlp_automaton}" --seeds "${SEEDS:-5}")
"${PYTHON:-python}" scripts/reproduce/rlp_fair.py "$out" "${given[@]}"
"${PYTHON:-python}" scripts/reproduce/rlp_fair.py "$out" "${given[@]}" --table
