#!/usr/bin/env bash
# Does a student learn more from traces that it can follow? A teacher of four layers works sums out and goes on checking; its
# students of two layers, half its size, have read a little of another style, without checks. Each is then fine-tuned on
# the teacher's right traces, on those of reverse speculative decoding, on half of each, and on its samples alone (a
# threshold of 1: the student writes), on equally many traces for equally many steps. Resumes where it stopped, seed by seed.
# usage: scripts/reproduce/traces.sh [OUT] [SEEDS]     e.g. runs/traces "0 1 2 3 4"
set -euo pipefail
out=${1:-runs/traces}
seeds=${2:-0 1 2 3 4}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled} out
export TEACHER=${TEACHER:-700} STUDENT=${STUDENT:-300} ASKED=${ASKED:-800} KEPT=${KEPT:-400} STEPS=${STEPS:-60}
export RATE=${RATE:-5e-4} sums="+experiment=micro_sums sampling.max_new_tokens=64 cold_start.max_length=96"

teacher() {
    echo "$out/teacher/cold_start sft $sums data=sums_checked model.layers=4 cold_start.steps=$TEACHER run_dir=$out/teacher"
}

student() { # SEED: it before the traces, and the traces
    local seed="$out/seed_$1" name threshold tries
    echo "$seed/student/cold_start sft $sums data=sums seed=$1 cold_start.steps=$STUDENT run_dir=$seed/student"
    evaluated "$1" before "$seed/student"
    while read -r name threshold tries; do
        echo "$seed/$name/sft.jsonl traces $sums data=sums seed=$1 model.path=$seed/student/cold_start" \
            "traces.teacher=$out/teacher/cold_start traces.threshold=$threshold traces.tries=$tries traces.problems=$ASKED" \
            "traces.batch_size=200 run_dir=$seed/$name"
    done <<<$'teacher 0 1\nfriendly 0.01 5\nalone 1 1'
}

arms() { # SEED: a student for each kind of traces
    local seed="$out/seed_$1" name
    for name in teacher friendly mixed alone; do
        echo "$seed/$name/trained/cold_start sft $sums data=hub data.path=$seed/$name/first.jsonl data.id=id" \
            "'data.prompt=\"{prompt}\"' data.answer=answer +data.meta.solution=solution seed=$1" \
            "model.path=$seed/student/cold_start cold_start.steps=$STEPS cold_start.learning_rate=$RATE" \
            "cold_start.order=shuffled run_dir=$seed/$name/trained"
        evaluated "$1" "$name" "$seed/$name/trained"
    done
}

evaluated() { # SEED NAME FOLDER: 500 held-out problems, greedy and sampled
    echo "$out/seed_$1/$2/evaluation.json evaluate $sums data=sums seed=$1 model.path=$3/cold_start" \
        "evaluation.problems=500 run_dir=$out/seed_$1/$2"
}

several() { python scripts/reproduce/several.py; }

teacher | several
for seed in $seeds; do
    student "$seed" | several
    python scripts/reproduce/traces.py mix "$out/seed_$seed" "$KEPT"
    arms "$seed" | several
done
python scripts/reproduce/traces.py table "$out"
