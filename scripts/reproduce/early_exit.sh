#!/usr/bin/env bash
# Early exits where completions go on after the answer is known: a micro model per seed that works sums out and then checks
# some of its lines. Wrong exits and tokens saved against delta. Resumes where it stopped. START names a trained model for all
# seeds, which then differ in their problems and draws alone.
# usage: scripts/reproduce/early_exit.sh [OUT] [SEEDS] [DELTAS]     e.g. runs/early_exit "0 1 2 3 4" "0.05 0.1 0.2 0.3"
set -euo pipefail
out=${1:-runs/early_exit}
seeds=${2:-0 1 2 3 4}
deltas=${3:-0.05 0.1 0.2 0.3}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}
steps=${STEPS:-500}
sums="+experiment=micro_sums data=sums_checked data.validation_size=800 data.test_size=500 sampling.max_new_tokens=64"

for seed in $seeds; do
    folder="$out/seed_$seed"
    [ -n "${START:-}" ] || echo "$folder/cold_start sft $sums seed=$seed cold_start.steps=$steps cold_start.max_length=96 run_dir=$folder"
    for delta in $deltas; do
        echo "$folder/$delta/evaluation.json evaluate $sums seed=$seed model.path=${START:-$folder/cold_start} evaluation.samples=1" \
            "data.seed=$seed evaluation.problems=500 evaluation.early_exit.delta=$delta evaluation.early_exit.problems=800" \
            "run_dir=$folder/$delta"
    done
done | python scripts/reproduce/several.py
python scripts/reproduce/early_exit.py "$out"
