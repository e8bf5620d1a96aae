"""The settings of the local engine."""

from __future__ import annotations

from dataclasses import dataclass

from rltrain.config import RolloutConfig
from rltrain.errors import require, require_one_of

MOST_GUESSES = 8


@dataclass(kw_only=True)
class LocalRolloutConfig(RolloutConfig):
    """How much is decoded at once; only ``dtype`` changes what is sampled.

    At most ``max_rows`` completions, or one group, are in flight; the others queue and refill the batch. The cache
    holds at most ``max_cache_tokens`` (0: what is free on a GPU, no limit on a CPU). When it is full, the youngest rows
    go back to the queue with their tokens. Rows are looked at every ``check_steps`` tokens (0: 4 on a CPU, 16
    elsewhere); finished ones leave when they are
    ``compact_share`` of the batch. ``cuda_graph=auto`` replays the steps of Llama-shaped models as CUDA graphs.
    ``dtype=bfloat16`` decodes with a cast copy of the weights, renewed by ``sync``; ``policy`` with the policy itself.
    Prefill and continuations forward ``prefix_tokens_per_pass`` tokens at a time (a single prompt may have more).
    Rows whose turns an environment answers wait until they are ``compact_share`` of the batch, each for at least
    ``reply_steps`` decode steps, which hide the latency of its reply: the others decode meanwhile.
    ``speculate_tokens`` (0: none) guesses so many of the next tokens of each row, once nothing queues and at most
    ``speculate_rows`` rows are left (:mod:`rltrain.rollout.speculation`). ``speculate_from=prompt`` looks them up in
    the prompt and the group; ``recycling`` takes the last successors of each token in the whole batch.
    """

    max_rows: int = 256
    max_cache_tokens: int = 0
    check_steps: int = 0
    compact_share: float = 0.25
    cuda_graph: str = "auto"
    dtype: str = "policy"
    prefix_tokens_per_pass: int = 16384
    speculate_tokens: int = 0
    speculate_rows: int = 8
    speculate_from: str = "prompt"
    reply_steps: int = 0

    def __post_init__(self) -> None:
        require(self.max_rows >= 1, f"rollout.max_rows={self.max_rows}: set at least 1")
        require(self.max_cache_tokens >= 0, f"rollout.max_cache_tokens={self.max_cache_tokens}: 0 means what is free")
        require(self.check_steps >= 0, f"rollout.check_steps={self.check_steps}: 0 means the device's usual number")
        require(self.cuda_graph in ("auto", "off"), f"rollout.cuda_graph={self.cuda_graph}: unknown; set auto or off")
        require(
            self.prefix_tokens_per_pass >= 1,
            f"rollout.prefix_tokens_per_pass={self.prefix_tokens_per_pass}: set at least 1; 16384 is usual",
        )
        require(
            0 < self.compact_share <= 1, f"rollout.compact_share={self.compact_share}: must lie in (0, 1]; 1 is off"
        )
        require(self.dtype in ("policy", "bfloat16"), f"rollout.dtype={self.dtype}: unknown; set policy or bfloat16")
        require(
            0 <= self.speculate_tokens <= MOST_GUESSES,
            f"rollout.speculate_tokens={self.speculate_tokens}: must lie in 0..{MOST_GUESSES}; 0 is off",
        )
        require(self.reply_steps >= 0, f"rollout.reply_steps={self.reply_steps}: must be >= 0; 0 waits for no step")
        require_one_of(("prompt", "recycling"), "rollout.speculate_from", self.speculate_from)
        require(
            self.speculate_tokens > 0 or self.speculate_from == "prompt",
            f"rollout.speculate_from={self.speculate_from} with rollout.speculate_tokens=0: guesses nothing; set "
            "rollout.speculate_tokens=4, or leave it out",
        )
        require(self.speculate_rows >= 1, f"rollout.speculate_rows={self.speculate_rows}: set at least 1")

    def steps_between_looks(self, device_type: str) -> int:
        """``check_steps``, or what is usual: where launches are asynchronous a look at the tokens stops all of them."""
        return self.check_steps or (4 if device_type == "cpu" else 16)

    def decode_dtype(self) -> str:
        return self.dtype

    def masks_reserved_rows(self) -> bool:
        return True  # the head that it decodes with has the mask

    def rows_in_flight(self, completions: int) -> int:
        return min(completions, self.max_rows)
