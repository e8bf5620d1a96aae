#!/usr/bin/env bash
# GRPO, TEMPO, SPAE and the regression on SmolLM2-135M, and a random reward as the control: seed by seed, so that what is
# finished is balanced at any time. A finished run is not made again.
# usage: scripts/reproduce/smollm2_methods.sh [OUT] [SEEDS]     e.g. runs/smollm2_methods "0 1 2"
# METHODS and MORE choose fewer methods and further overrides.
set -euo pipefail
out=${1:-runs/smollm2_methods}
seeds=${2:-0 1 2}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}

overrides() { # METHOD
    case $1 in
        grpo) echo advantage=group ;;
        tempo) echo advantage=tempo ;;
        # The loss and the sampling of the others: spae_lines brings clip 0.28 and dynamic sampling.
        spae) echo "algorithm=spae_lines loss.clip_high=0.2 batch.dynamic_sampling=false advantage.continuations=2" \
            "advantage.probe_max_tokens=4" ;;
        regression) echo advantage=regression ;;
        random) echo "advantage=group reward@rewards.answer=random +reward@eval_rewards.answer=exact_value" ;;
        *) echo "method $1: unknown; choose of grpo tempo spae regression random" >&2 && exit 2 ;;
    esac
}

for seed in $seeds; do
    for method in ${METHODS:-grpo tempo spae regression random}; do
        echo "$out/$method-seed$seed/finished train +experiment=smollm2_lines seed=$seed name=$method" \
            "run_dir=$out/$method-seed$seed $(overrides "$method") ${MORE:-}"
    done
done | python scripts/reproduce/several.py
rm -rf "$out"/*-seed*/checkpoints # 1.6 GB each
python -m rltrain.compare "$out" --by name --baseline grpo
