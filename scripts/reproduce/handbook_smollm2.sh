#!/usr/bin/env bash
# Handbooks that SmolLM2-135M-Instruct extracts from its own solutions, with the prompts by default and with a prompt that
# shows two examples, and 100 held-out problems with and without the second: one operation on integers to 20, after two
# worked turns. Needs rltrain[smollm2].
# usage: scripts/reproduce/handbook_smollm2.sh [OUT]
set -euo pipefail
out=${1:-runs/handbook_smollm2}
problems=${PROBLEMS:-8}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} WANDB_MODE=${WANDB_MODE:-disabled}
common=(+experiment=smollm2_randomcalc data.handbook_tag=steps)
asked=("${common[@]}" evaluation.problems=100 sampling.max_prompt_tokens=480)
read -r -d '' shown <<'TEXT' || true
Question: {question}
Solution: {solution}
Reflection: {reflection}
Write one rule that helps with other questions, on one line in the form of these examples.
behavior_tens_first: Add the tens before the ones.
behavior_times_ten: To multiply by ten, write a zero behind the number.
TEXT

extract() { # OUT [OVERRIDE…]: a model that names no behaviour ends with exit code 1, and its answers stay
    local folder=$1
    shift
    [ -f "$folder/handbook.jsonl" ] || python -m rltrain.commands.handbook extract "${common[@]}" "run_dir=$folder" \
        "handbook.problems=$problems" handbook.keep=all handbook.batch_size=8 handbook.max_new_tokens=64 "$@" || true
}

extract "$out/default"
extract "$out/shown" "handbook.extract='$shown'"
[ -f "$out/without/evaluation.json" ] || python -m rltrain.evaluate "${asked[@]}" "run_dir=$out/without"
[ -f "$out/with/evaluation.json" ] || python -m rltrain.evaluate "${asked[@]}" "run_dir=$out/with" \
    "data.handbook=$out/shown/handbook.jsonl" data.handbook_top=3
