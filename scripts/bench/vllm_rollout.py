"""vLLM's side of rollout.py, a child process in an environment of vLLM's own.

    PYTHON scripts/bench/vllm_rollout.py MODEL_FOLDER REQUEST.json

The request holds prompts (token ids), group_size, new_tokens and max_model_len. Every line on standard input is one
rollout; its answer is a line on file descriptor 3 with the seconds it took and the tokens it made.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Serve rollouts until standard input ends."""
    import vllm

    folder, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    engine = vllm.LLM(
        model=folder,
        dtype="float32",
        max_model_len=request["max_model_len"],
        max_num_seqs=len(request["prompts"]) * request["group_size"],
        kv_cache_memory_bytes=2**30,
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
    )
    sampling = vllm.SamplingParams(
        n=request["group_size"], max_tokens=request["new_tokens"], ignore_eos=True, temperature=1.0, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    with os.fdopen(3, "w") as answers:
        for _ in sys.stdin:
            engine.reset_prefix_cache()  # weights change between rollouts
            start = time.perf_counter()
            outputs = engine.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
            tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
            print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
