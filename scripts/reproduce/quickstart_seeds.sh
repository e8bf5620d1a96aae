#!/usr/bin/env bash
# The quickstart and its controls on five seeds, two processes at a time with one thread each. Resumes where it stopped.
# Per seed, from one cold start: the right, a random and the inverted reward; and as many sequences of the cold start's
# own supervised training as RL sees (80 x 64 = 40 x 128), on fresh problems, at two rates. All models are evaluated on the
# same 2000 held-out problems, greedily and with one sample at temperature 1.
# usage: scripts/reproduce/quickstart_seeds.sh [OUT] [SEEDS] [ARMS]     e.g. runs/quickstart_seeds "0 1" "right sft_5e-4_280"
set -euo pipefail
out=${1:-runs/quickstart_seeds}
seeds=${2:-0 1 2 3 4}
arms=${3:-right random inverted sft_1e-4_80 sft_5e-4_80}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled} out

cold_start() { # SEED
    local run="$out/seed_$1"
    [ -d "$run/right/cold_start" ] || python -m rltrain.sft +experiment=quickstart "seed=$1" "run_dir=$run/right"
    for reward in random inverted; do
        mkdir -p "$run/$reward"
        [ -d "$run/$reward/cold_start" ] || cp -r "$run/right/cold_start" "$run/$reward/"
    done
}

evaluate() { # SEED MODEL OUT
    local how
    for how in 0 1; do
        [ -f "$3/temperature_$how/evaluation.json" ] || python -m rltrain.evaluate +experiment=quickstart "seed=$1" \
            "model.path=$2" "run_dir=$3/temperature_$how" "evaluation.temperature=$how" evaluation.problems=2000 \
            data.test_size=2000
    done
}

arm() { # SEED ARM: a reward, or supervised training as sft_RATE_STEPS
    local run="$out/seed_$1" rate steps
    if [[ $2 == sft_* ]]; then
        IFS=_ read -r _ rate steps <<< "$2"
        [ -d "$run/$2/cold_start" ] || python -m rltrain.sft +experiment=quickstart "seed=$1" \
            "model.path=$run/right/cold_start" data.seed=1 data.all_worked=0 "cold_start.steps=$steps" \
            cold_start.warmup_steps=5 "cold_start.learning_rate=$rate" "run_dir=$run/$2"
        evaluate "$1" "$run/$2/cold_start" "$run/$2"
    else
        python -m rltrain.train "+experiment=spurious_$2" "seed=$1" "run_dir=$run/$2"
        evaluate "$1" "$run/$2/checkpoints/step_000040/policy" "$run/$2"
        if [ "$2" = right ]; then evaluate "$1" "$run/right/cold_start" "$run/cold_start"; fi
    fi
}
export -f cold_start evaluate arm

printf '%s\n' $seeds | xargs -P 2 -I SEED bash -euo pipefail -c 'cold_start SEED'
for seed in $seeds; do
    printf '%s\n' $arms | xargs -P 2 -I ARM bash -euo pipefail -c "arm $seed ARM"
done
python scripts/reproduce/quickstart_seeds.py "$out"
