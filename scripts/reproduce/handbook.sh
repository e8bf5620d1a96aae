#!/usr/bin/env bash
# Behaviours in the prompt of a tiny model, and fine-tuning on solutions that were written with them. Per seed: a cold
# start on problems of one to three operators that writes checked solutions by itself, answers at once after the words
# "at once", and leaves the checks out after "steps". Then 512 held-out problems without a handbook, with a handbook by
# tag (the number of operators), and with its instructions swapped. Then two models that are fine-tuned from the cold
# start on its own right solutions of the same problems, written with and without the handbook; both are asked without.
# usage: scripts/reproduce/handbook.sh [OUT] [SEEDS]     e.g. runs/handbook "0 1 2 3 4"
set -euo pipefail
out=${1:-runs/handbook}
seeds=${2:-0 1 2 3 4}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}
STEPS=${STEPS:-800} MORE=${MORE:-100} PROBLEMS=${PROBLEMS:-1000}

mkdir -p "$out"
entry() { # FILE NAME INSTRUCTION [TAGS]
    printf '{"name": "%s", "instruction": "%s"%s}\n' "$2" "$3" "${4:+, \"tags\": [$4]}" >>"$1"
}
handbook() { # NAME TAGS_OF_AT_ONCE TAGS_OF_STEPS
    printf '{"tags": ["1", "2", "3"]}\n' >"$out/$1.jsonl"
    entry "$out/$1.jsonl" at_once "at once" "$2"
    entry "$out/$1.jsonl" steps steps "$3"
}
handbook handbook '"1"' '"2", "3"'
handbook swapped '"2", "3"' '"1"'
: >"$out/at_once.jsonl" && entry "$out/at_once.jsonl" at_once "at once"
: >"$out/steps.jsonl" && entry "$out/steps.jsonl" steps steps

problems=('steps=[1,2,3]' solution=checked max_operand=9 operators=+-)
shown=("handbook_template='{behaviours}: {question}'" "handbook_entry='{instruction}'" handbook_tag=steps)
sampling=(sampling.max_new_tokens=64 sampling.max_prompt_tokens=48 evaluation.problems=512)

run() { # MODULE SEED OUT [OVERRIDE…]
    local module=$1 seed=$2 folder=$3
    shift 3
    # shellcheck disable=SC2086 # a command and its action are two words
    python -m rltrain.$module "seed=$seed" "run_dir=$folder" reward@rewards.answer=exact_value "${sampling[@]}" "$@"
}

of_problems=(data=small_integers "${problems[@]/#/data.}" "${shown[@]/#/data.}")

source_of() { # NAME [OVERRIDE…]: a source of the cold start's mixture
    local name=$1 each
    shift
    printf '%s\n' "+data@cold_start_data.sources.$name=small_integers"
    for each in "${problems[@]}" "${shown[@]}" "$@"; do printf '%s\n' "cold_start_data.sources.$name.$each"; done
}

evaluate() { # SEED MODEL OUT [OVERRIDE…]
    local seed=$1 model=$2 folder=$3
    shift 3
    [ -f "$folder/evaluation.json" ] ||
        run evaluate "$seed" "$folder" model=pretrained "model.path=$model" "${of_problems[@]}" "$@"
}

tuned() { # SEED ARM [OVERRIDE…]: right solutions by the cold start, fine-tuning on them, evaluation without a handbook
    local seed=$1 arm=$2 folder="$out/seed_$1/$2" start="$out/seed_$1/cold/cold_start"
    shift 2
    [ -f "$folder/sft.jsonl" ] || run "commands.handbook traces" "$seed" "$folder" model=pretrained "model.path=$start" \
        "${of_problems[@]}" "handbook.problems=$PROBLEMS" "$@"
    [ -d "$folder/cold_start" ] || run sft "$seed" "$folder" model=pretrained "model.path=$start" data=hub \
        "data.path=$folder/sft.jsonl" data.id=id 'data.prompt="{prompt}"' data.answer=answer \
        +data.meta.solution=solution "cold_start.steps=$MORE" cold_start.batch_size=32 cold_start.learning_rate=5e-4 cold_start.warmup_steps=5 \
        cold_start.schedule=linear cold_start.share=false
    evaluate "$seed" "$folder/cold_start" "$folder/evaluation"
}

for seed in $seeds; do
    folder="$out/seed_$seed"
    mapfile -t sources < <(
        source_of plain
        source_of once solution=answer "handbook=$out/at_once.jsonl"
        source_of short solution=steps "handbook=$out/steps.jsonl"
    )
    [ -d "$folder/cold/cold_start" ] || run sft "$seed" "$folder/cold" model=micro_by_seed "${of_problems[@]}" \
        +data@cold_start_data=mixture "${sources[@]}" "cold_start.steps=$STEPS" cold_start.learning_rate=2e-3 \
        cold_start.schedule=linear cold_start.batch_size=32 cold_start.max_length=128 cold_start.share=false
    evaluate "$seed" "$folder/cold/cold_start" "$folder/without"
    evaluate "$seed" "$folder/cold/cold_start" "$folder/with" "data.handbook=$out/handbook.jsonl"
    evaluate "$seed" "$folder/cold/cold_start" "$folder/swapped" "data.handbook=$out/swapped.jsonl"
    tuned "$seed" tuned_with "data.handbook=$out/handbook.jsonl"
    tuned "$seed" tuned_without
done
python scripts/reproduce/handbook.py "$out"
