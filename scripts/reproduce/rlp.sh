#!/usr/bin/env bash
# RLP on documents of equations against as much continued next-token training, from one cold start per seed.
# usage: [STEPS=150] [SEEDS="0 1 2"] [NEXT_TOKEN_STEPS=1800] scripts/reproduce/rlp.sh [OUT]
#
# Per RLP step about 23,000 tokens pass forward, a backward pass counted as two: 4,000 sampled, 7,000 scored, 12,000
# trained on. A step of next-token training on 64 documents: 2,100. So 12 of them cost a little more than one of RLP.
# The last two lines per seed are log p(x_t | prefix, thought) of the model before and after RLP, minus
# log p(x_t | prefix) of the model that went on with next-token training: positive where thinking beats it.
set -euo pipefail
out=${1:-runs/rlp}
steps=${STEPS:-150}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}
seed_of() { # everything that one seed needs, in order
    seed=$1
    run="$out/rlp_$seed"
    python -m rltrain.train +experiment=rlp seed="$seed" steps="$steps" run_dir="$run"
    python -m rltrain.sft +experiment=rlp seed="$seed" run_dir="$out/next_token_$seed" \
        model.path="$run/cold_start" cold_start.steps="${NEXT_TOKEN_STEPS:-$((steps * 12))}" \
        cold_start_data.plain_share=1 cold_start.problems=100000
    policy=$(ls -d "$run"/checkpoints/step_*/policy | tail -n 1)
    for model in "$run/cold_start" "$policy"; do
        echo "seed $seed: $model over next-token training"
        python -m rltrain.evaluate +experiment=rlp seed="$seed" model.path="$model" \
            scorer.kind=frozen scorer.path="$out/next_token_$seed/cold_start" \
            run_dir="$out/against_next_token_$seed/$(basename "$model")"
    done
}
export -f seed_of
export out steps
echo "${SEEDS:-0 1 2}" | xargs -n 1 | xargs -P 2 -I SEED bash -euo pipefail -c 'seed_of SEED'
python scripts/reproduce/plot.py "$out/curves.png" "$out"/rlp_* --metric eval_reward
grep -H eval_reward "$out"/against_next_token_*/*/evaluation.json
