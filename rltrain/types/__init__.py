"""Frozen records that cross module boundaries, and the shape legend.

Legend. A tensor's name ends in its axes:

    P  prompts                  G  samples per prompt        S  sequences (prompt + completion)
    T  tokens of a sequence     N  tokens that carry loss    L  flat tokens of a packed micro-batch
    V  vocabulary               D  hidden size               B  rows of a padded batch
"""

from rltrain.types.batches import LossOutput, TokenBatch
from rltrain.types.completions import Completion, Finish, Group, Notes, UnknownLogprobs
from rltrain.types.metrics import Max, Mean, Metric, Metrics, Min, Std, Sum
from rltrain.types.outcomes import Advantages, Scores, is_right
from rltrain.types.problems import AdvisedProblem, Message, Problem, Prompt, TokenProblem, bare_prompt, user_text
from rltrain.types.services import (
    NO_CONTINUER,
    NO_ENTROPY,
    NO_GRADER,
    NO_PROBER,
    NO_SCORER,
    NO_STATE,
    NO_VALUES,
    Context,
    Continuer,
    EntropySource,
    Grader,
    Need,
    Prober,
    RolloutServices,
    SpanRequest,
    SpanScorer,
    State,
    TokenEntropy,
    Undeclared,
    ValueSource,
)
from rltrain.types.turns import Environment, Reply, Turn, among_observed, turns_before, written_mask

__all__ = [
    "NO_CONTINUER",
    "NO_ENTROPY",
    "NO_GRADER",
    "NO_PROBER",
    "NO_SCORER",
    "NO_STATE",
    "NO_VALUES",
    "Advantages",
    "AdvisedProblem",
    "Completion",
    "Context",
    "Continuer",
    "EntropySource",
    "Environment",
    "Finish",
    "Grader",
    "Group",
    "LossOutput",
    "Max",
    "Mean",
    "Message",
    "Metric",
    "Metrics",
    "Min",
    "Need",
    "Notes",
    "Prober",
    "Problem",
    "Prompt",
    "Reply",
    "RolloutServices",
    "Scores",
    "SpanRequest",
    "SpanScorer",
    "State",
    "Std",
    "Sum",
    "TokenBatch",
    "TokenEntropy",
    "TokenProblem",
    "Turn",
    "Undeclared",
    "UnknownLogprobs",
    "ValueSource",
    "among_observed",
    "bare_prompt",
    "is_right",
    "turns_before",
    "user_text",
    "written_mask",
]
