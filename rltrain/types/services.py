"""What a part may use besides the groups: what it declares (``Need``), the services behind that, and ``Context``."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

from rltrain.errors import RunError
from rltrain.types.completions import Completion, Group
from rltrain.types.problems import Message

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rltrain.rollout.continuation_types import ContinuationRequest
    from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings


class Need(enum.Enum):
    """What a part asks the trainer to compute for it; nothing else is computed."""

    REFERENCE_LOGPROBS = "log-probs under the initial policy: of the loss's tokens, and of given spans beside SCORER"
    PROBES = "the rollout engine, to continue from inside a completion"
    SCORER = "per-token log-probs of given spans under the policy, a frozen model or an EMA"
    ENTROPY = "entropy and collision probability of the sampling distribution at each completion token"
    CONTINUATIONS = "completions continued from inside, and the run's rewards of them"
    VALUES = "the value that the policy's introspection head predicts at each completion token"
    STATE = "tensors kept from step to step and with the checkpoint"


@dataclass(frozen=True, kw_only=True)
class SpanRequest:
    """A sequence to score: log-probs are wanted of ``token_ids[start:stop]`` for each span ``(start, stop)``.

    The first ``prompt_tokens`` ids are the prompt, before all spans; requests of equal prompts may share its forward.
    """

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    prompt_tokens: int = 1

    def __post_init__(self) -> None:
        first, last = self.prompt_tokens, len(self.token_ids)
        if not 1 <= first < last:
            raise ValueError(f"SpanRequest: a prompt of {first} tokens in a sequence of {last}")
        if not all(first <= start <= stop <= last for start, stop in self.spans):
            raise ValueError(f"SpanRequest: spans {self.spans} do not lie in {first}..{last}")


class Prober(Protocol):
    """The service behind ``Need.PROBES``, at ``context.rollout``."""

    def probe(self, requests: Sequence[ProbeRequest], settings: ProbeSettings) -> list[ProbeResult]:
        """The policy's answer in mid-completion: one result per request, in order. All ranks call this together."""
        ...


class SpanScorer(Protocol):
    """The service behind ``Need.SCORER``, at ``context.scorer``: per request and span the log-probs of its tokens.

    Always at temperature 1, fp32, on the CPU. All ranks call these together.
    """

    def policy(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        """Under the policy as it is now."""
        ...

    def entropies(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        """Entropies of the policy's distribution over each token of the spans, in nats."""
        ...

    def phi(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        """Under the model phi (``ScorerConfig``)."""
        ...

    def reference(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        """Under the initial policy (or ``reference``), where ``Need.REFERENCE_LOGPROBS`` is declared, too."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenEntropy:
    """Of the sampling distribution pi at each token of a completion, float32 or float64 on the CPU.

    ``entropy_T`` is H = -Σ_v pi_v log pi_v in nats, ``collision_T`` is Σ_v pi_v², the chance that two draws are equal.
    Both are NaN at the ids that an environment wrote.
    """

    entropy_T: Tensor
    collision_T: Tensor


class EntropySource(Protocol):
    """The service behind ``Need.ENTROPY``, at ``context.entropy``."""

    def __call__(self, groups: Sequence[Group]) -> list[list[TokenEntropy]]:
        """``[p][g]`` is of completion g of group p. All ranks call this together."""
        ...


class ValueSource(Protocol):
    """The service behind ``Need.VALUES``, at ``context.values``."""

    def __call__(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """``[p][g]`` is V(s_t) [T] of completion g of group p, float64 on the CPU: the expected reward before token t.

        All ranks call this together.
        """
        ...


class Continuer(Protocol):
    """The service behind ``Need.CONTINUATIONS``, at ``context.rollout``."""

    def continue_(self, requests: Sequence[ContinuationRequest]) -> list[list[Completion]]:
        """``draws`` completions per request, in order: the ids after the prefix, their log-probs, how they ended.

        ``text`` is that of the new ids. All ranks call this together, also those that have no request.
        """
        ...


class Grader(Protocol):
    """The service behind ``Need.CONTINUATIONS``, at ``context.grade``."""

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with ``rewards_G`` and ``reward_parts`` by the run's own rewards; NaN where they abstain.

        A group may hold any number of completions. Their texts, and those of their turns, are decoded from their ids.
        Metrics, failures and states of the rewards are those of the step itself, and stay as they were. All ranks call
        this together, also those that have no group.
        """
        ...


# ``context.state`` of a part with ``Need.STATE``: tensors by name. All ranks keep equal ones.
State = MutableMapping[str, "Tensor"]


class Undeclared:
    """In the place of a service whose ``Need`` was not declared: every use of it is an error that says how to."""

    def __init__(self, field: str, need: Need) -> None:
        self._field, self._need = field, need

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask for these
            raise AttributeError(name)
        self._refuse(f"context.{self._field}.{name}")

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        self._refuse(f"context.{self._field}")

    __getitem__ = __setitem__ = __delitem__ = __contains__ = __iter__ = __len__ = __call__

    def _refuse(self, used: str) -> NoReturn:
        need = self._need.name
        remedy = f"register the part with needs={{Need.{need}}}, or give a function of yours needs = {{Need.{need}}}"
        raise RunError(f"{used}: nothing declared this service; {remedy}")


NO_PROBER = cast(Prober, Undeclared("rollout", Need.PROBES))
NO_CONTINUER = cast(Continuer, Undeclared("rollout", Need.CONTINUATIONS))
NO_GRADER = cast(Grader, Undeclared("grade", Need.CONTINUATIONS))
NO_SCORER = cast(SpanScorer, Undeclared("scorer", Need.SCORER))
NO_ENTROPY = cast(EntropySource, Undeclared("entropy", Need.ENTROPY))
NO_VALUES = cast(ValueSource, Undeclared("values", Need.VALUES))
NO_STATE = cast("State", Undeclared("state", Need.STATE))


@dataclass(frozen=True, kw_only=True)
class RolloutServices:
    """``context.rollout``: each service is there if its own ``Need`` was declared."""

    prober: Prober = NO_PROBER
    continuer: Continuer = NO_CONTINUER

    def probe(self, requests: Sequence[ProbeRequest], settings: ProbeSettings) -> list[ProbeResult]:
        """See :class:`Prober`."""
        return self.prober.probe(requests, settings)

    def continue_(self, requests: Sequence[ContinuationRequest]) -> list[list[Completion]]:
        """See :class:`Continuer`."""
        return self.continuer.continue_(requests)


def _fresh_state(part: str) -> State:
    return {}


def _no_encoder(prompt: str | Sequence[Message]) -> tuple[int, ...]:
    raise RunError("context.encode: there is no model here whose tokenizer could make a prompt; call it in a run")


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an estimator or a reward may use besides the groups.

    ``rollout``, ``grade``, ``scorer``, ``entropy``, ``values`` and ``state`` are services: their use is a RunError
    unless their ``Need`` was declared. ``tokenizer`` is None where there is no model, as in the bench. ``encode`` gives
    the ids of a text or of chat messages as those of a prompt: through the chat template where the run's problems are.
    ``state_of`` gives the state of a part by its key. Outside a run each call of a part has a fresh one.
    ``reward_weights`` are by a reward's name.
    """

    step: int = 0
    seed: int = 0
    max_new_tokens: int = 0
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    rollout: RolloutServices = field(default_factory=RolloutServices)
    encode: Callable[[str | Sequence[Message]], tuple[int, ...]] = _no_encoder
    scorer: SpanScorer = NO_SCORER
    entropy: EntropySource = NO_ENTROPY
    values: ValueSource = NO_VALUES
    grade: Grader = NO_GRADER
    state: State = NO_STATE
    state_of: Callable[[str], State] = _fresh_state

    @property
    def predicts_values(self) -> bool:
        """Whether the policy has an introspection head, which evaluations read, too."""
        return not isinstance(self.values, Undeclared)

    def of_part(self, key: str, needs: frozenset[Need]) -> Context:
        """The context that the part ``key`` is called with: ``state`` is its own where it declares ``Need.STATE``."""
        return replace(self, state=self.state_of(key) if Need.STATE in needs else NO_STATE)
