#!/usr/bin/env bash
# The calculator miniature and its control over seeds, two processes at a time with one thread each. Resumes where it
# stopped. Per seed, from one cold start: GRPO on the outcome; MT-GRPO, which rewards a call that gives a result, too; and
# as many sequences of the cold start's own supervised training as RL sees (60 x 64 = 30 x 128), on fresh problems.
# usage: scripts/reproduce/calculator.sh [OUT] [SEEDS]     e.g. runs/calculator "0 1 2 3 4 5 6 7"
set -euo pipefail
out=${1:-runs/calculator}
seeds=${2:-0 1 2 3 4 5 6 7}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled} out
export STEPS=${STEPS:-30} JOBS=${JOBS:-2} MORE=${MORE:-}

run() { # MODULE SEED OUT [OVERRIDE…]
    local module=$1 seed=$2 folder=$3
    shift 3
    # shellcheck disable=SC2086 # MORE holds several overrides
    python -m "rltrain.$module" +experiment=calculator "seed=$seed" "run_dir=$folder" $MORE "$@"
}

evaluate() { # SEED MODEL OUT: greedy, and four samples at temperature 1
    [ -f "$3/greedy/evaluation.json" ] || run evaluate "$1" "$3/greedy" "model.path=$2"
    [ -f "$3/sampled/evaluation.json" ] ||
        run evaluate "$1" "$3/sampled" "model.path=$2" evaluation.temperature=1 evaluation.samples=4
}

cold_start() { # SEED
    local seed="$out/seed_$1"
    [ -d "$seed/outcome/cold_start" ] || run sft "$1" "$seed/outcome"
    evaluate "$1" "$seed/outcome/cold_start" "$seed/cold_start"
}

arm() { # SEED ARM
    local seed="$out/seed_$1" given="cold_start.path=$out/seed_$1/outcome/cold_start" model
    model="$seed/$2/checkpoints/step_$(printf %06d "$STEPS")/policy"
    case $2 in
        outcome) run train "$1" "$seed/$2" "steps=$STEPS" ;;
        turns) run train "$1" "$seed/$2" "steps=$STEPS" "$given" algorithm=mt_grpo \
            loss.aggregation=sequence environment.call_reward=1 ;; # the advantage alone differs
        sft_*)
            model="$seed/$2/cold_start"
            [ -d "$model" ] || run sft "$1" "$seed/$2" "model.path=$seed/outcome/cold_start" data.seed=1 \
                data.all_worked=0 "cold_start.steps=$((STEPS * 2))" cold_start.warmup_steps=5 \
                "cold_start.learning_rate=${2#sft_}"
            ;;
    esac
    evaluate "$1" "$model" "$seed/$2"
}
export -f run evaluate cold_start arm

printf '%s\n' $seeds | xargs -P "$JOBS" -I SEED bash -euo pipefail -c 'cold_start SEED'
for seed in $seeds; do
    printf '%s\n' outcome turns sft_1e-4 sft_5e-4 | xargs -P "$JOBS" -I ARM bash -euo pipefail -c "arm $seed ARM"
done
python scripts/reproduce/calculator.py "$out"
