#!/usr/bin/env bash
# Methods x seeds on this machine, then their comparison. Run it again to go on: what is finished is skipped.
#
#   scripts/sweep.sh METHODS SEEDS [overrides that all runs share]
#
# METHODS is a text file with one method a line: a name, then overrides without blanks or quotes. For example
#   grpo   +experiment=quickstart
#   tempo  +experiment=quickstart algorithm=tempo
# SEEDS is a count: 5 means 0 1 2 3 4. A run is in OUT/NAME-seedS and has name=NAME.
#
# A seed's cold start is trained once, in the run of the first method, and copied to the others; a run that would have
# made another one refuses it and names the keys that differ (COLD_START=own copies none).
# From the environment: OUT (runs/ and the name of METHODS), PYTHON (python), JOBS: runs at a time, one thread each. With
# GPUs, of CUDA_VISIBLE_DEVICES or all, a run has one and JOBS is their number, else 2. More JOBS share the GPUs.
set -euo pipefail

methods=$1
seeds=$2
shift 2
out=${OUT:-runs/$(basename "${methods%.*}")}
export OMP_NUM_THREADS=1 WANDB_MODE=${WANDB_MODE:-disabled} PYTHON=${PYTHON:-python}
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    devices=$CUDA_VISIBLE_DEVICES
else
    devices=$(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p' | paste -sd, || true)
fi
export devices
IFS=, read -ra gpus <<<"$devices"
mapfile -t lines < <(sed 's/#.*//' "$methods" | grep '[^[:space:]]')
mkdir -p "$out"

# One line per run, NAME SEED OVERRIDES…, seed by seed, so that a change of load on the machine falls on all methods.
runs=$(for ((seed = 0; seed < seeds; seed++)); do
    for line in "${lines[@]}"; do
        read -r name overrides <<<"$line"
        [[ $name != *=* ]] || { echo "sweep.sh: no name before $name in $methods" >&2; exit 1; }
        echo "$name $seed tracking.group=$(basename "$out") $* $overrides" | sed 's/ *$//'
    done
done)

arguments() { # NAME SEED OVERRIDES…
    echo "${*:3} name=$1 seed=$2 run_dir=$out/$1-seed$2"
}
cold_start() { # where there is none to train, the run itself says so
    local run=$out/$1-seed$2
    [ -d "$run/cold_start" ] && return
    mkdir -p "$run"
    # shellcheck disable=SC2046 # overrides hold no blanks, and -f keeps brackets from being globs
    "$PYTHON" -m rltrain.sft $(arguments "$@") >>"$run/sweep.log" 2>&1 || true
}
share() { # SEED FIRST OTHER: a copy appears whole or not at all
    local from=$out/$2-seed$1/cold_start to=$out/$3-seed$1
    [ -d "$from" ] && [ ! -d "$to/cold_start" ] || return 0
    mkdir -p "$to"
    rm -rf "$to/.copying_cold_start"
    cp -r "$from" "$to/.copying_cold_start"
    mv "$to/.copying_cold_start" "$to/cold_start"
}
one_gpu() { # SLOT: of the runs at one time each has another slot
    local gpus
    IFS=, read -ra gpus <<<"$devices"
    [ ${#gpus[@]} = 0 ] || export CUDA_VISIBLE_DEVICES=${gpus[$1 % ${#gpus[@]}]}
}
train() { # what was asked for is written down at the end; the same again is nothing to do
    local run=$out/$1-seed$2 asked
    asked=$(arguments "$@")
    [ "$(cat "$run/finished.txt" 2>/dev/null)" = "$asked" ] && return
    mkdir -p "$run"
    echo "sweep: $1, seed $2"
    # shellcheck disable=SC2086
    if "$PYTHON" -m rltrain.train $asked >>"$run/sweep.log" 2>&1; then
        echo "$asked" >"$run/finished.txt"
    else
        echo "sweep: $1, seed $2 stopped: $(tail -n 1 "$run/sweep.log")" >&2
        return 1
    fi
}
export -f arguments cold_start one_gpu train
export out
at_once() { # FUNCTION: call it with the words of each line of the input
    local jobs=2 slots=()
    ((${#gpus[@]} == 0)) || jobs=${#gpus[@]} slots=(--process-slot-var=SLOT) # of GNU; macOS has no GPUs of this kind
    xargs -P "${JOBS:-$jobs}" ${slots[@]+"${slots[@]}"} -L 1 \
        bash -feuo pipefail -c 'one_gpu "${SLOT:-0}"; '"$1"' "$@"' _
}

read -r first _ <<<"${lines[0]}"
if [ "${COLD_START:-shared}" = shared ]; then
    echo "$runs" | awk -v name="$first" '$1 == name' | at_once cold_start
    while read -r name seed _; do share "$seed" "$first" "$name"; done <<<"$runs"
fi
failed=0
echo "$runs" | at_once train || failed=1
"$PYTHON" -m rltrain.compare "$out" --baseline "$first"
exit "$failed"
