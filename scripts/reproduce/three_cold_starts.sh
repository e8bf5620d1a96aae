#!/usr/bin/env bash
# RL from three cold starts: does one that keeps its entropy leave RL more to work with? Resumes where it stopped.
# Per seed one model reads worked solutions (WORKED steps). From it SECOND steps on EXPERIMENT's mixture, three problems of
# four with the box alone: at a constant rate, at one that falls to 0, and as the second with CurioSFT's objective. Then
# GRPO. JOBS seeds at a time. START names a trained model for all seeds, in place of the first stage.
# MORE holds further overrides.
# usage: scripts/reproduce/three_cold_starts.sh [OUT] [SEEDS] [STEPS of RL]     e.g. runs/three_cold_starts "0 1 2 3 4" 24
set -euo pipefail
out=${1:-runs/three_cold_starts}
seeds=${2:-0 1 2 3 4}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled} out
export steps=${3:-24} EXPERIMENT=${EXPERIMENT:-micro_sums} WORKED=${WORKED:-500} SECOND=${SECOND:-100} MORE=${MORE:-} START=${START:-}

commands() { # SEED: a line for the model that all three start from, and a line for each arm
    local worked="$out/worked-seed$1" name
    local start=${START:-$worked/cold_start}
    [ -n "$START" ] || echo "$worked/cold_start sft +experiment=$EXPERIMENT seed=$1 run_dir=$worked data.all_worked=100000" \
        "cold_start.steps=$WORKED cold_start.schedule=constant $MORE"
    for name in constant decayed curio; do
        echo "$out/$name-seed$1/finished train +experiment=$EXPERIMENT seed=$1 data.seed=$1 name=$name" \
            "run_dir=$out/$name-seed$1 model.path=$start data.all_worked=0 cold_start.steps=$SECOND cold_start.warmup_steps=5" \
            "cold_start.learning_rate=3e-4 $(second_stage $name) steps=$steps $MORE"
    done
}

second_stage() { # NAME
    case $1 in
        constant) echo cold_start.schedule=constant ;;
        decayed) echo cold_start.schedule=linear ;;
        curio) echo cold_start.schedule=linear cold_start.objective=curio ;;
    esac
}
export -f commands second_stage

printf '%s\n' $seeds | xargs -P "${JOBS:-1}" -I SEED bash -euo pipefail -c \
    'commands SEED | python scripts/reproduce/several.py'
python -m rltrain.compare "$out"/{decayed,constant,curio}-seed* --baseline decayed
