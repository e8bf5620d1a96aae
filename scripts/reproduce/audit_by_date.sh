#!/usr/bin/env bash
# Does the audit by date show that a model has seen one side? A tiny model learns questions from before the cut-off by heart,
# another as many of the same kind that are not asked. Resumes where it stopped.
# usage: scripts/reproduce/audit_by_date.sh [OUT] [SEEDS]     e.g. runs/audit_by_date "0 1 2"
set -euo pipefail
out=${1:-runs/audit_by_date}
seeds=${2:-0 1 2}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled}
steps=${STEPS:-600}
of="data=hub 'data.prompt=\"{question}\"' data.answer=answer model=micro_by_seed reward@rewards.answer=exact_value"

for seed in $seeds; do
    python scripts/reproduce/audit_by_date.py "$out/$seed" "$seed"
    for seen in seen other; do
        folder="$out/$seed/$seen"
        echo "$folder/cold_start sft $of data.path=$folder/train.jsonl +data.meta.rest=rest seed=$seed run_dir=$folder" \
            "cold_start.solution_field=rest cold_start.steps=$steps cold_start.learning_rate=3e-3" \
            "cold_start.schedule=linear cold_start.max_length=128"
        echo "$folder/audit.json audit $of data.path=$out/$seed/asked +data.meta.day=day seed=$seed run_dir=$folder" \
            "model.path=$folder/cold_start sampling.max_new_tokens=80 --probe 60 audit.date_field=day" \
            "audit.cutoff=2024-07-01"
    done
done | python scripts/reproduce/several.py
