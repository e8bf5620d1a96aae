#!/usr/bin/env bash
# Does a filter by measured pass rate help? Per seed, from one cold start: all problems, the first MEASURED alone, and those
# of these whose rate of 8 samples lies in 0.1..0.9. Resumes where it stopped, seed by seed.
# usage: scripts/reproduce/pass_rates.sh [OUT] [SEEDS]     e.g. runs/pass_rates "0 1 2 3 4"
# EXPERIMENT and MEASURED choose another task, START a trained model for all seeds. MORE holds further overrides.
set -euo pipefail
out=${1:-runs/pass_rates}
seeds=${2:-0 1 2 3 4}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}
experiment=${EXPERIMENT:-micro_sums}
measured=${MEASURED:-600}

for seed in $seeds; do
    folder="$out/start_$seed"
    start=${START:-$folder/cold_start}
    of="+experiment=$experiment seed=$seed data.seed=$seed ${MORE:-}"
    from="cold_start.path=$start"
    [ -n "${START:-}" ] || echo "$start sft $of run_dir=$folder"
    # The training split is cut to what is measured, in the file's fingerprint and in the runs that are compared.
    cut="data.train_size=$measured"
    echo "$out/rates_$seed/finished pass_rates $of $cut model.path=$start run_dir=$out/rates_$seed" \
        "--samples 8 --to $out/rates_$seed.jsonl"
    echo "$out/all_$seed/finished train $of name=all run_dir=$out/all_$seed $from"
    echo "$out/same_problems_$seed/finished train $of name=same_problems run_dir=$out/same_problems_$seed $from $cut"
    echo "$out/filtered_$seed/finished train $of name=filtered run_dir=$out/filtered_$seed $from $cut" \
        "data.pass_rate=[0.1,0.9] data.pass_rate_file=$out/rates_$seed.jsonl"
done | python scripts/reproduce/several.py
python -m rltrain.compare "$out" --by name --baseline same_problems
