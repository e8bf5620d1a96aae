#!/usr/bin/env bash
# DAPO against SPAE: the cold start goes on checking after the answer, so that there is something to prune.
# usage: [SEEDS=5] [JOBS=2] scripts/reproduce/spae.sh [OUT]
#
# Both have the same reward: DAPO's overlong penalty is left out, which would shorten completions by itself. Answers have
# at most two digits, so two continuations of four tokens probe them.
set -euo pipefail
export OUT=${1:-runs/spae}
scripts/sweep.sh scripts/reproduce/spae.txt "${SEEDS:-5}" +experiment=chains
"${PYTHON:-python}" -m rltrain.compare "$OUT" --baseline dapo --metric eval_completions/mean_length --plot "$OUT/length.png"
