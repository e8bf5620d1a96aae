#!/usr/bin/env bash
# RL from three cold starts, and none: does one that keeps its entropy leave RL more to work with? Resumes where it stopped.
# Per seed one model reads worked solutions (360 steps). From it 150 steps on the quickstart's mixture, three problems of
# four with the box alone: at a constant rate, at one that falls to 0, and as the second with CurioSFT's objective. Then GRPO.
# usage: scripts/reproduce/three_cold_starts.sh [OUT] [SEEDS] [STEPS of RL]     e.g. runs/three_cold_starts "0 1 2 3 4" 60
set -euo pipefail
out=${1:-runs/three_cold_starts}
seeds=${2:-0 1 2 3 4}
steps=${3:-60}
jobs=${JOBS:-2}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled} out steps

worked() { # SEED: the model that all three start from
    [ -d "$out/worked-seed$1/cold_start" ] || python -m rltrain.sft +experiment=quickstart "seed=$1" \
        cold_start.steps=360 cold_start.schedule=constant "run_dir=$out/worked-seed$1"
}

arm() { # NAME SEED overrides of the second stage
    local name=$1 seed=$2 run="$out/$1-seed$2"
    shift 2
    [ -f "$run/summary.json" ] || python -m rltrain.train +experiment=quickstart "seed=$seed" "name=$name" \
        "run_dir=$run" "model.path=$out/worked-seed$seed/cold_start" data.all_worked=0 cold_start.steps=150 \
        cold_start.warmup_steps=5 cold_start.learning_rate=3e-4 "steps=$steps" evaluation.every_steps=10 \
        evaluation.samples=4 evaluation.temperature=1 "$@"
}
export -f worked arm

printf '%s\n' $seeds | xargs -P "$jobs" -I SEED bash -euo pipefail -c 'worked SEED'
for seed in $seeds; do
    printf '%s\n' "constant $seed cold_start.schedule=constant" "decayed $seed cold_start.schedule=linear" \
        "curio $seed cold_start.schedule=linear cold_start.objective=curio" |
        xargs -P "$jobs" -I ARM bash -euo pipefail -c 'arm ARM'
done
python -m rltrain.compare "$out"/{decayed,constant,curio}-seed* --baseline decayed
