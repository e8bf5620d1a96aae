#!/usr/bin/env bash
# The quickstart and its controls on five seeds, two processes at a time with one thread each. Resumes where it stopped.
# Per seed, from one cold start: the right, a random and the inverted reward; and as many sequences of the cold start's
# own supervised training as RL sees (280 x 64 = 140 x 128), on fresh problems, at two rates.
# usage: scripts/reproduce/quickstart_seeds.sh [OUT] [SEEDS]     e.g. runs/quickstart_seeds "0 1 2 3 4"
set -euo pipefail
out=${1:-runs/quickstart_seeds}
seeds=${2:-0 1 2 3 4}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled} out

cold_start() { # SEED
    local run="$out/seed_$1"
    [ -d "$run/right/cold_start" ] || python -m rltrain.sft +experiment=quickstart "seed=$1" "run_dir=$run/right"
    for reward in random inverted; do
        mkdir -p "$run/$reward"
        [ -d "$run/$reward/cold_start" ] || cp -r "$run/right/cold_start" "$run/$reward/"
    done
}

evaluate() { # NAME SEED MODEL OUT: greedy, and four samples at temperature 1
    [ -f "$4/greedy/evaluation.json" ] ||
        python -m rltrain.evaluate +experiment=quickstart "seed=$2" "model.path=$3" "run_dir=$4/greedy"
    [ -f "$4/sampled/evaluation.json" ] ||
        python -m rltrain.evaluate +experiment=quickstart "seed=$2" "model.path=$3" "run_dir=$4/sampled" \
            evaluation.temperature=1 evaluation.samples=4
}

arm() { # SEED ARM: a reward, or supervised training at a rate
    local run="$out/seed_$1"
    if [[ $2 == sft_* ]]; then
        [ -d "$run/$2/cold_start" ] || python -m rltrain.sft +experiment=quickstart "seed=$1" \
            "model.path=$run/right/cold_start" data.seed=1 data.all_worked=0 cold_start.steps=280 \
            cold_start.warmup_steps=5 "cold_start.learning_rate=${2#sft_}" "run_dir=$run/$2"
        evaluate "$2" "$1" "$run/$2/cold_start" "$run/$2"
    else
        python -m rltrain.train "+experiment=spurious_$2" "seed=$1" "run_dir=$run/$2"
        evaluate "$2" "$1" "$run/$2/checkpoints/step_000140/policy" "$run/$2"
        if [ "$2" = right ]; then evaluate cold_start "$1" "$run/right/cold_start" "$run/cold_start"; fi
    fi
}
export -f cold_start evaluate arm

printf '%s\n' $seeds | xargs -P 2 -I SEED bash -euo pipefail -c 'cold_start SEED'
for seed in $seeds; do
    printf '%s\n' right random inverted sft_1e-4 sft_5e-4 | xargs -P 2 -I ARM bash -euo pipefail -c "arm $seed ARM"
done
python scripts/reproduce/quickstart_seeds.py "$out"
