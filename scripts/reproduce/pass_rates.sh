#!/usr/bin/env bash
# Does a filter by measured pass rate help the quickstart? Per seed, from one cold start: all problems, and those whose
# rate of 8 samples lies in 0.1..0.9, 40 steps each. The table: python -m rltrain.compare OUT --by name
# usage: scripts/reproduce/pass_rates.sh [OUT] [SEEDS]     e.g. runs/pass_rates "0 1 2 3 4"
set -euo pipefail
out=${1:-runs/pass_rates}
seeds=${2:-0 1 2 3 4}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}

for seed in $seeds; do
    python -m rltrain.train +experiment=quickstart "seed=$seed" name=all "run_dir=$out/all_$seed"
    # The training split is cut to what is measured, in both the file's fingerprint and the run.
    python -m rltrain.commands.pass_rates +experiment=quickstart "seed=$seed" model=pretrained \
        "model.path=$out/all_$seed/cold_start" data.train_size=4000 "run_dir=$out/rates_$seed" \
        --samples 8 --to "$out/rates_$seed.jsonl"
    python -m rltrain.train +experiment=quickstart "seed=$seed" name=filtered "run_dir=$out/filtered_$seed" \
        data.train_size=4000 "data.pass_rate=[0.1,0.9]" "data.pass_rate_file=$out/rates_$seed.jsonl" \
        "cold_start.path=$out/all_$seed/cold_start"
    python -m rltrain.train +experiment=quickstart "seed=$seed" name=same_problems "run_dir=$out/same_problems_$seed" \
        data.train_size=4000 "cold_start.path=$out/all_$seed/cold_start"
done
python -m rltrain.compare "$out" --by name
