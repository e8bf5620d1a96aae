#!/usr/bin/env bash
# The introspection head on the quickstart's models, after scripts/reproduce/quickstart_seeds.sh has made them. Per seed, the
# reserved rows are trained alone on completions of the cold start and of the policy after RL; then calibration and adaptive
# sampling against votes on 300 held-out problems. The table: python scripts/reproduce/introspection.py OUT
# usage: scripts/reproduce/introspection.sh [OUT] [MODELS] [SEEDS]    e.g. runs/introspection runs/quickstart_seeds "0 1 2 3 4"
set -euo pipefail
out=${1:-runs/introspection}
models=${2:-runs/quickstart_seeds}
seeds=${3:-0 1 2 3 4}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}

head_of() { # NAME SEED MODEL BUDGETS
    local run="$out/$1_$2"
    [ -f "$run/evaluation.json" ] && return
    python -m rltrain.train +experiment=introspection "name=$1" "seed=$2" "model.path=$3" cold_start.steps=0 steps=40 \
        model.introspection.alone=true model.introspection.trunk=false model.introspection.kl_coef=0 \
        optimizer.learning_rate=1e-2 evaluation.every_steps=0 checkpoint.every_steps=0 "run_dir=$run"
    python -m rltrain.evaluate +experiment=introspection "seed=$2" "model.path=$run/checkpoints/step_000040/policy" \
        evaluation.problems=300 evaluation.temperature=1 "evaluation.adaptive.budgets=$4" \
        evaluation.adaptive.problems=100 "run_dir=$run"
}

for seed in $seeds; do
    head_of cold "$seed" "$models/seed_$seed/right/cold_start" '[20,40,60]'
    head_of after "$seed" "$models/seed_$seed/right/checkpoints/step_000040/policy" '[60,90,120]'
done
python scripts/reproduce/introspection.py "$out"
