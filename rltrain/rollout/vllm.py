"""Rollout by vLLM: an engine in each rank's process, or servers that all ranks share. See docs/vllm.md."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rltrain.config import RolloutConfig, SamplingConfig
from rltrain.errors import require, require_one_of
from rltrain.registry import register
from rltrain.rollout import probes
from rltrain.rollout.continuation_types import ContinuationRequest
from rltrain.rollout.continuations import check_requests, draw_key, rule_of, sampling_of
from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings
from rltrain.rollout.sampling import row_key
from rltrain.rollout.stopping import StopRule
from rltrain.rollout.vllm_requests import Request, Sampled, SamplingEngine, request_seed, sampling_fields, seed_of
from rltrain.types import Completion, Group, Prompt

MODES = ("colocated", "server")
ROUTES = ("auto", "nccl", "files")
_instances = itertools.count()


@dataclass(kw_only=True)
class VllmRolloutConfig(RolloutConfig):
    """``colocated``: an engine in each rank's process. ``server``: `vllm serve` at ``urls``, shared by all ranks.

    Weights go to servers by ``weights``: over ``nccl``, through ``files``, or ``auto``: NCCL where trainer and servers
    have GPUs. ``folder`` is where files are handed over; trainer and servers must see it under the same path. One call
    to a server takes at most ``request_s``; when none is left, the step waits ``restart_s`` for one to come back. A
    rank has ``max_requests`` calls under way at once. A colocated engine keeps a cache of ``cache_gib``, 0 for
    what is free on a GPU less a reserve where the engine sleeps and 2 GiB elsewhere. It gives its memory
    back while the rank trains (``sleep``, on GPUs), and gets ``engine`` as further arguments of ``vllm.LLM``.
    ``zero_stage`` is the trainer's: above 0 the ranks share its moments out, and the reserve is for a share.
    Its log-probs differ from the trainer's, by rounding at least: ``loss.importance_correction=auto`` is ``truncate``.
    """

    mode: str = "colocated"  # colocated (in the trainer's process) or server
    urls: list[str] = field(default_factory=list)
    weights: str = "auto"  # how weights go to servers: auto, nccl or files
    folder: str = "${run_dir}/vllm"
    request_s: float = 600.0
    restart_s: float = 900.0
    max_requests: int = 256
    cache_gib: float = 0.0
    sleep: bool = True
    zero_stage: int = "${deepspeed.zero_stage}"  # type: ignore[assignment]
    engine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.mode in MODES, f"rollout.mode={self.mode}: unknown; set one of {', '.join(MODES)}")
        require_one_of(ROUTES, "rollout.weights", self.weights)
        require(
            self.mode != "server" or bool(self.urls),
            "rollout.urls: empty; set the servers' addresses, for example rollout.urls=[http://node1:8000]",
        )
        require(
            self.mode != "colocated" or not self.urls,
            "rollout.urls with rollout.mode=colocated: have no effect; set rollout.mode=server",
        )
        require(
            self.mode != "colocated" or not self.ahead,
            "rollout.ahead=true with rollout.mode=colocated: engine and trainer take turns on one device; set "
            "rollout.mode=server",
        )
        for url in self.urls:
            require(url.startswith(("http://", "https://")), f"rollout.urls: {url} is no address; write http://{url}")
        require(self.cache_gib >= 0, f"rollout.cache_gib={self.cache_gib}: must be >= 0; 0 is what fits")
        for key in ("request_s", "restart_s", "max_requests"):
            require(getattr(self, key) > 0, f"rollout.{key}={getattr(self, key)}: must be > 0")

    def needed_correction(self) -> str:
        return "truncate"


@register("rollout", "vllm", VllmRolloutConfig)
class VllmRollout:
    """Samples with vLLM, token ids in and out.

    A completion's seed is the key that the local sampler would use, so a step can be repeated; it ends where the local
    sampler's rule says. Log-probs are vLLM's, of the distribution that it sampled from: the policy's but for the order
    of sums and, where it computes in another precision, for that.
    """

    same_distribution = False
    uses_policy = False

    def __init__(self, config: VllmRolloutConfig, sampling: SamplingConfig, policy: Any, *, seed: int) -> None:
        self._sampling, self._policy, self._seed = sampling, policy, seed
        longest = sampling.max_prompt_tokens + sampling.max_new_tokens
        self._engine = _engine(config, policy, longest=longest)
        self.sync(policy)

    def awake(self) -> AbstractContextManager[None]:
        """For calls that follow each other: the engine keeps its memory between them."""
        return self._engine.awake()

    def sync(self, policy: Any) -> None:
        """Push the policy's weights into the engine; all ranks call this together."""
        self._engine.push(policy.model)

    def probe(self, requests: Sequence[ProbeRequest], settings: ProbeSettings) -> list[ProbeResult]:
        """Continuations from inside completions, by the policy itself."""
        return probes.probe(self._policy, requests, settings)

    def continue_(self, requests: Sequence[ContinuationRequest], *, step: int) -> list[list[Completion]]:
        """Continuations from inside completions; the engine's cache of prefixes holds what they have in common."""
        rule = StopRule.of(self._policy, self._sampling)
        check_requests(requests, self._sampling, rule)
        rules = [rule_of(one, rule) for one in requests]
        samplings = [sampling_of(one, self._sampling) for one in requests]
        asked = [
            Request(
                prompt_ids=request.prefix_ids,
                seed=continuation_seed(self._seed, step, request, draw),
                fields=sampling_fields(sampling, own_rule),
            )
            for request, own_rule, sampling in zip(requests, rules, samplings, strict=True)
            for draw in range(request.draws)
        ]
        answers = iter(self._engine.sample(asked, sampling_fields(self._sampling, rule)))
        return [
            [completion(next(answers), own_rule, greedy=sampling.temperature == 0) for _ in range(request.draws)]
            for request, own_rule, sampling in zip(requests, rules, samplings, strict=True)
        ]

    def generate(
        self, prompts: Sequence[Prompt], *, step: int, group_size: int, sampling: SamplingConfig | None = None
    ) -> list[Group]:
        """``group_size`` completions of each prompt, in the order of ``prompts``; rewards are not set."""
        sampling = sampling or self._sampling
        rule = StopRule.of(self._policy, sampling)
        requests = [
            Request(
                prompt_ids=prompt.token_ids,
                seed=request_seed(self._seed, step, prompt.problem.id, sample, prompt.occurrence),
            )
            for prompt in prompts
            for sample in range(group_size)
        ]
        answers = iter(self._engine.sample(requests, sampling_fields(sampling, rule)))
        greedy = sampling.temperature == 0
        return [
            Group(
                prompt=prompt,
                completions=tuple(completion(next(answers), rule, greedy=greedy) for _ in range(group_size)),
            )
            for prompt in prompts
        ]


def completion(sampled: Sampled, rule: StopRule, *, greedy: bool) -> Completion:
    """An answer cut by our own rule. Greedy sampling is a point mass: its log-probs are 0, as everywhere here."""
    end = rule.end(sampled.token_ids, 0)
    ids, logprobs = sampled.token_ids[:end], sampled.logprobs[:end]
    return rule.completion(ids, (0.0,) * len(ids) if greedy else logprobs)


def continuation_seed(seed: int, step: int, request: ContinuationRequest, draw: int) -> int:
    """Of a draw. A later turn of a completion has a seed of its own, since vLLM's numbers begin with every request."""
    turn = request.one_turn
    if turn is None:
        return seed_of(draw_key(seed, step, request, draw))
    return seed_of(row_key(turn.key, step, "turn", turn.position) if turn.position else turn.key)


def _engine(config: VllmRolloutConfig, policy: Any, *, longest: int) -> SamplingEngine:
    # Two engines of one process, each with a policy of its own, must not overwrite each other's weights.
    folder = Path(config.folder) / f"engine_{next(_instances)}"
    if config.mode == "server":
        from rltrain.rollout.vllm_server import Servers

        return Servers(
            config.urls,
            folder,
            request_s=config.request_s,
            restart_s=config.restart_s,
            max_requests=config.max_requests,
            longest=longest,
            weights=config.weights,
        )
    from rltrain.rollout.vllm_colocated import ColocatedEngine

    return ColocatedEngine(
        policy,
        folder,
        longest=longest,
        cache_gib=config.cache_gib,
        sleep=config.sleep,
        zero_stage=config.zero_stage,
        arguments=config.engine,
    )
