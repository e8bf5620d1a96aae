#!/usr/bin/env bash
# ConMax on wordy solutions: cold start, RL of the compressor, compressed data sets, and students trained on original,
# prompt-only-compressed and ConMax traces of the same problems.
# usage: [STEPS=100] [SEEDS="0 1 2"] [TRACES=8192] [STUDENT_STEPS=300] scripts/reproduce/conmax.sh [OUT]
#
# The result per student: eval_accuracy and eval_completions/mean_length in OUT/student_NAME_SEED/evaluation.json.
set -euo pipefail
out=${1:-runs/conmax}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}
shorten() { # SEED NAME COMPRESSOR FROZEN
    python -m rltrain.compress +experiment=conmax seed="$1" run_dir="$out/$2_$1" model.path="$3" scorer.path="$4" \
        data.validation_size="${TRACES:-8192}"
}
student() { # SEED NAME FILE COLUMN
    python -m rltrain.sft model=tiny data=hub data.path="$3" data.id=id data.prompt="'{prompt}'" \
        +data.meta.solution="$4" seed="$1" model.init_seed="$1" run_dir="$out/student_$2_$1" \
        cold_start.steps="${STUDENT_STEPS:-300}" cold_start.max_length=256
    python -m rltrain.evaluate model=tiny data=wordy_solutions data.tasks=[solve] reward@rewards.answer=exact_value \
        seed="$1" run_dir="$out/student_$2_$1" model.path="$out/student_$2_$1/cold_start" \
        sampling.max_new_tokens=128 sampling.max_prompt_tokens=64 evaluation.problems=500
}
seed_of() { # everything that one seed needs, in order
    run="$out/conmax_run_$1"
    python -m rltrain.train +experiment=conmax seed="$1" steps="${STEPS:-100}" run_dir="$run"
    shorten "$1" prompt_only "$run/cold_start" "$run/cold_start"
    shorten "$1" conmax "$(ls -d "$run"/checkpoints/step_*/policy | tail -n 1)" "$run/cold_start"
    student "$1" original "$out/conmax_$1/sft.jsonl" original_solution
    student "$1" prompt_only "$out/prompt_only_$1/sft.jsonl" solution
    student "$1" conmax "$out/conmax_$1/sft.jsonl" solution
}
export -f seed_of shorten student
export out
echo "${SEEDS:-0 1 2}" | xargs -n 1 | xargs -P 2 -I SEED bash -euo pipefail -c 'seed_of SEED'
tail -n +1 "$out"/student_*/evaluation.json
