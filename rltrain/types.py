"""Frozen records that cross module boundaries, and the shape legend.

Legend. A tensor's name ends in its axes:

    P  prompts                  G  samples per prompt        S  sequences (prompt + completion)
    T  tokens of a sequence     N  tokens that carry loss    L  flat tokens of a packed micro-batch
    V  vocabulary               D  hidden size               B  rows of a padded batch
"""

from __future__ import annotations

import abc
import enum
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol, cast

from rltrain.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rltrain.rollout.continuation_types import ContinuationRequest
    from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings

Finish = Literal["stop", "length"]
Message = Mapping[str, Any]  # role, content (text), and what else the chat template reads
# What a part wants kept with the samples of a group: by name, one list per completion.
Notes = Mapping[str, Sequence[Sequence[float | str]]]


class Need(enum.Enum):
    """What a part asks the trainer to compute for it; nothing else is computed."""

    REFERENCE_LOGPROBS = "log-probs under the initial policy: of the loss's tokens, and of given spans beside SCORER"
    PROBES = "the rollout engine, to continue from inside a completion"
    SCORER = "per-token log-probs of given spans under the policy, a frozen model or an EMA"
    ENTROPY = "entropy and collision probability of the sampling distribution at each completion token"
    CONTINUATIONS = "completions continued from inside, and the run's rewards of them"
    STATE = "tensors kept from step to step and with the checkpoint"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One task: ``prompt`` is text or chat messages, ``answer`` the gold, ``meta`` whatever a reward reads."""

    id: str
    prompt: str | Sequence[Message]
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A problem as the token ids the policy is fed; ``continuation_ids`` follow them in the problem's own text.

    No token ids: the problem cannot be asked, and is left out. ``occurrence`` is how often the step drew the same
    problem before, over all ranks and sampling attempts.
    """

    problem: Problem
    token_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...] = ()
    occurrence: int = 0


class TokenProblem(Problem, abc.ABC):
    """A problem that makes its own prompt, because it is cut or joined in token ids."""

    @abc.abstractmethod
    def encode(self, tokenizer: Any, render: Callable[[str], tuple[int, ...]]) -> Prompt:
        """``render`` gives the ids of a text as a prompt, through the chat template where the model has one."""


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


@dataclass(frozen=True, kw_only=True)
class UnknownLogprobs(Sequence[float]):
    """In place of sampled log-probs that nobody kept: reading any of them, or their number, is a ``RunError``."""

    reason: str

    def _refuse(self) -> NoReturn:
        raise RunError(f"Completion.logprobs: unknown, {self.reason}; what reads sampled log-probs cannot run here")

    def __len__(self) -> int:
        self._refuse()

    def __getitem__(self, index: Any) -> Any:
        self._refuse()

    def __array__(self, *arguments: Any, **options: Any) -> Any:  # NumPy takes an object that has no length as a scalar
        self._refuse()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Sampled ids (EOS included) and the fp32 log-probs of the distribution they were sampled from, where known.

    ``text`` is the decoded completion without special tokens at its end; ids are never made from it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | UnknownLogprobs
    finish: Finish
    text: str = ""
    entropies: tuple[tuple[float, float], ...] | None = None  # H and collision by token, where the sampler kept them

    def __post_init__(self) -> None:
        if not isinstance(self.logprobs, UnknownLogprobs) and len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"Completion: {len(self.token_ids)} token ids but {len(self.logprobs)} log-probs; give one per token"
            )

    def continued(self, position: int, new: Completion) -> Completion:
        """The first ``position`` ids, then those of ``new``, as one completion; its text is for ``context.grade``."""
        before, logprobs = self.logprobs, new.logprobs
        if isinstance(before, UnknownLogprobs):
            logprobs = before
        elif not isinstance(logprobs, UnknownLogprobs):
            logprobs = before[:position] + logprobs
        return Completion(token_ids=self.token_ids[:position] + new.token_ids, logprobs=logprobs, finish=new.finish)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The G completions of one prompt. A NaN reward abstains: that completion leaves its group's statistics."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards_G: Tensor | None = None
    reward_parts: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Notes = field(default_factory=dict)
    right_G: Tensor | None = None

    def __post_init__(self) -> None:
        size = len(self.completions)
        named = dict(self.reward_parts) | ({} if self.rewards_G is None else {"rewards_G": self.rewards_G})
        for name, values_G in named.items():
            if tuple(values_G.shape) != (size,):
                raise ValueError(
                    f"Group {self.prompt.problem.id}: {name} has shape {tuple(values_G.shape)}, expected ({size},)"
                )

    @property
    def completion_ids(self) -> list[tuple[int, ...]]:
        return [completion.token_ids for completion in self.completions]


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A metric as (sum, count), so that it is averaged once over micro-batches and ranks."""

    total: float
    count: float

    @classmethod
    def of(cls, values: Any) -> Mean:
        """Mean of a number, a sequence of numbers or a tensor."""
        if hasattr(values, "numel"):
            return cls(total=float(values.double().sum()), count=values.numel())
        if isinstance(values, (int, float)):
            return cls(total=float(values), count=1)
        items = [float(value) for value in values]
        return cls(total=sum(items), count=len(items))

    def __add__(self, other: Mean) -> Mean:
        return Mean(total=self.total + other.total, count=self.count + other.count)


@dataclass(frozen=True, kw_only=True)
class Max:
    """A metric reduced by maximum."""

    value: float

    def __add__(self, other: Max) -> Max:
        return Max(value=max(self.value, other.value))


@dataclass(frozen=True, kw_only=True)
class Min:
    """A metric reduced by minimum."""

    value: float

    def __add__(self, other: Min) -> Min:
        return Min(value=min(self.value, other.value))


@dataclass(frozen=True, kw_only=True)
class Sum:
    """A metric summed over micro-batches and ranks, such as a loss whose weights are global."""

    value: float

    def __add__(self, other: Sum) -> Sum:
        return Sum(value=self.value + other.value)


@dataclass(frozen=True, kw_only=True)
class Std:
    """A standard deviation (ddof 1; 0 of one value): count, mean, sum of squared deviations (Chan et al., 1979)."""

    count: float
    mean: float
    squares: float

    @classmethod
    def of(cls, values: Tensor) -> Std:
        """Of all the values of a tensor."""
        if not values.numel():
            return cls(count=0, mean=0.0, squares=0.0)
        mean = values.double().mean()
        squares = (values.double() - mean).square().sum()
        return cls(count=values.numel(), mean=float(mean), squares=float(squares))

    @property
    def value(self) -> float:
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def __add__(self, other: Std) -> Std:
        count = self.count + other.count
        if not count:
            return self
        shift = other.mean - self.mean
        return Std(
            count=count,
            mean=self.mean + shift * other.count / count,
            squares=self.squares + other.squares + shift**2 * self.count * other.count / count,
        )


Metric = Mean | Max | Min | Sum | Std
Metrics = Mapping[str, Metric]


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
    """

    entropy_T: Tensor
    collision_T: Tensor


class EntropySource(Protocol):
    """The service behind ``Need.ENTROPY``, at ``context.entropy``."""

    def __call__(self, groups: Sequence[Group]) -> list[list[TokenEntropy]]:
        """``[p][g]`` is of completion g of group p. All ranks call this together."""
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

        A group may hold any number of completions; their texts are decoded from all their ids. Metrics, failures and
        states of the rewards are those of the step itself, and stay as they were. All ranks call this together, also
        those that have no group.
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

    ``rollout``, ``grade``, ``scorer``, ``entropy`` and ``state`` are services: their use is a RunError unless their
    ``Need`` was declared. ``tokenizer`` is None where there is no model, as in the bench. ``encode`` gives the ids of a
    text or of chat messages as those of a prompt: through the chat template where the run's problems go through it.
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
    grade: Grader = NO_GRADER
    state: State = NO_STATE
    state_of: Callable[[str], State] = _fresh_state

    def of_part(self, key: str, needs: frozenset[Need]) -> Context:
        """The context that the part ``key`` is called with: ``state`` is its own where it declares ``Need.STATE``."""
        return replace(self, state=self.state_of(key) if Need.STATE in needs else NO_STATE)


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """One value per completion token: ``values[p][g]`` has shape ``[T]`` of completion g of group p.

    ``notes[p]`` says how group p came by its values, for the samples that a run keeps; none at all is fine.
    """

    values: Sequence[Sequence[Tensor]]
    metrics: Metrics = field(default_factory=dict)
    notes: Sequence[Notes] = ()


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a reward returns: ``scores[p][g]``, None to abstain, its own metrics, and notes as in ``Advantages``;
    ``right[p][g]`` where it knows better than :func:`is_right`, for accuracy and pass@k."""

    scores: Sequence[Sequence[float | None]]
    right: Sequence[Sequence[bool]] = ()
    metrics: Metrics = field(default_factory=dict)
    notes: Sequence[Notes] = ()


def is_right(score: Any, *, above: float = 1 - 1e-9) -> Any:
    """Whether a score (or each of a tensor) says that the answer is right: it exceeds ``above``, 1 less rounding.

    NaN, an abstention, is not right. Where a reward has values between 0 and 1, a metric may count from 0.5 on.
    """
    return score > above


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """A packed micro-batch.

    Sequence s occupies ``input_ids_L[boundaries_S1[s]:boundaries_S1[s + 1]]`` and restarts its positions at 0.
    Loss token n is predicted by the hidden state at ``source_N[n]`` and belongs to sequence ``sequence_N[n]``;
    its weight was set over the whole optimiser batch and all ranks, so the loss is a plain weighted sum.

    Without ``old_logprobs_N`` the policy before the update is the current one, as in the only update of a step.
    ``selected_N`` are the tokens that the loss chose once a minibatch (``LossConfig.marked``). ``keys_N`` names a token
    by its problem, sample and place, whatever the micro-batches and ranks.

    Without ``prefix_S`` the sequences are forwarded as padded rows; with it as they lie, end to end. Then sequence s
    continues sequence ``prefix_S[s]`` (a prompt that several completions share), or none (-1): it attends to the
    prefix's tokens without repeating them, and its positions go on from there.
    """

    input_ids_L: Tensor
    positions_L: Tensor
    boundaries_S1: Tensor
    source_N: Tensor
    sequence_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    advantages_N: Tensor
    sampler_logprobs_N: Tensor
    old_logprobs_N: Tensor | None = None
    reference_logprobs_N: Tensor | None = None
    selected_N: Tensor | None = None
    keys_N: Tensor | None = None
    prefix_S: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.targets_N)
        for name in (name for name in vars(self) if name.endswith("_N")):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"TokenBatch: {name} has {len(value)} entries, targets_N has {count}")
        if len(self.input_ids_L) != len(self.positions_L) or int(self.boundaries_S1[-1]) != len(self.input_ids_L):
            raise ValueError("TokenBatch: boundaries_S1 must end at the number of input ids and positions")
        if self.prefix_S is not None and len(self.prefix_S) != len(self.boundaries_S1) - 1:
            raise ValueError("TokenBatch: prefix_S must have one entry per sequence")


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """The loss of a micro-batch, its metrics, and the log-probs, without gradient, that it was computed from."""

    loss: Tensor
    metrics: Metrics
    logprobs_N: Tensor
