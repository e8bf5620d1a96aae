#!/usr/bin/env bash
# GRPO against TEMPO: chains of three and four operations, equal samples, one cold start per seed.
# usage: [SEEDS=5] [JOBS=2] scripts/reproduce/tempo.sh [OUT]
set -euo pipefail
OUT=${1:-runs/tempo} scripts/sweep.sh scripts/reproduce/tempo.txt "${SEEDS:-5}" +experiment=chains
