"""What reads a completion of several turns reads the ids that the model wrote, and no others.

The log-probs and entropies of observed ids are NaN, so that a reader which forgets them returns NaN here.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from local_engine import ALPHABET, EOS, tokenizer

from rltrain.advantages.check import EstimatorError
from rltrain.advantages.estimator import estimator_of
from rltrain.config import SamplingConfig
from rltrain.policy.load import load_policy
from rltrain.policy.logprobs import LogprobModel
from rltrain.policy.tiny import TinyConfig
from rltrain.rewards.format import FormatConfig
from rltrain.rewards.grading import with_text
from rltrain.rewards.length import (
    CosineConfig,
    OverlongConfig,
    RepetitionConfig,
    cosine,
    cosine_length,
    overlong,
    repetition,
    repetition_penalty,
)
from rltrain.rewards.scoring import score
from rltrain.rewards.trl_function import trl_arguments
from rltrain.rollout.entropies import SampledEntropies
from rltrain.rollout.stopping import StopRule
from rltrain.runs import completions
from rltrain.runs.step_metrics import completion_metrics
from rltrain.types import Advantages, Completion, Context, Group, Problem, Prompt, Turn, UnknownLogprobs

NAN = math.nan
TURNS = (
    Turn(written=3, observed=3, reward=0.5, state_key="a", called=True, text="<t>", reply="6", latency_s=0.1),
    Turn(written=2, state_key="b", text="\\boxed{6}"),
)
TALK = Completion(
    token_ids=(10, 11, 10, 11, 10, 11, 12, 13),
    logprobs=(-0.1, -0.2, -0.3, NAN, NAN, NAN, -0.4, -0.5),
    finish="stop",
    text="\\boxed{6}",
    entropies=((0.1, 0.9), (0.2, 0.8), (0.3, 0.7), *[(NAN, NAN)] * 3, (0.4, 0.6), (0.5, 0.5)),
    turns=TURNS,
)
ALONE = Completion(token_ids=(5, 6), logprobs=(-1.0, -2.0), finish="stop", text="\\boxed{7}")
GROUP = Group(
    prompt=Prompt(problem=Problem(id="p", prompt="4+2", answer="6"), token_ids=(1, 2)),
    completions=(TALK, ALONE),
    rewards_G=torch.tensor([1.0, 0.0], dtype=torch.float64),
)
CONTEXT = Context(max_new_tokens=10)


def test_metrics_of_a_step():
    """-Σ log p over 5 + 2 written ids; lengths count all 8 + 2."""
    metrics = completion_metrics([GROUP])
    entropy = metrics["entropy/sampled"]
    assert (entropy.total, entropy.count) == (pytest.approx(0.1 + 0.2 + 0.3 + 0.4 + 0.5 + 3.0), 7)
    assert (metrics["completions/written_tokens"].total, metrics["completions/written_tokens"].count) == (7, 2)
    assert metrics["completions/mean_length"].total == metrics["completions/tokens"].value == 10
    assert "completions/written_tokens" not in completion_metrics([replace(GROUP, completions=(ALONE, ALONE))])


def test_written_ids_and_spans():
    assert TALK.written_ids == (10, 11, 10, 12, 13)
    assert TALK.written_logprobs == (-0.1, -0.2, -0.3, -0.4, -0.5)
    assert TALK.written_spans == ((0, 3), (6, 8))
    assert (ALONE.written_ids, ALONE.written_spans) == (ALONE.token_ids, ((0, 2),))
    unknown = UnknownLogprobs(reason="a table")
    assert replace(TALK, logprobs=unknown).written_logprobs is unknown


def test_length_rewards():
    """Written: 5 of 10 tokens. The limit, and so the overlong penalty, counts all 8: (8 - 8)/2 and (7 - 8)/3."""
    (row,) = cosine([GROUP], CosineConfig(), CONTEXT).scores
    assert row[0] == cosine_length(5, at_zero=2.0, at_limit=1.0, limit_tokens=10)
    assert cosine([GROUP], CosineConfig(max_tokens=8), CONTEXT).scores[0][0] == -10.0
    assert overlong([GROUP], OverlongConfig(), CONTEXT).scores == [[0.0, 0.0]]
    assert overlong([GROUP], OverlongConfig(cache_tokens=3), CONTEXT).scores[0][0] == pytest.approx(-1 / 3)


def test_repetition_counts_within_the_turns_of_the_model():
    """Bigrams (10, 11), (11, 10) and (12, 13): none repeated, though the tool repeats two, and none across a border."""
    (row,) = repetition([GROUP], RepetitionConfig(ngram=2), CONTEXT).scores
    assert row == [0.0, 0.0]
    assert repetition_penalty(TALK.token_ids, ngram=2, max_penalty=-1.0) == pytest.approx(-3 / 7)
    assert repetition_penalty((1, 2), (1, 2, 1), ngram=2, max_penalty=-1.0) == pytest.approx(-1 / 3)


def test_a_completion_that_abstains_gets_no_reward_and_leaves_the_statistics():
    group = replace(GROUP, completions=(replace(TALK, abstains=True, failed="timeout"), ALONE), rewards_G=None)
    (scored,), metrics = score([group], {"format": FormatConfig(tags=[], box=True)}, Context())
    torch.testing.assert_close(scored.rewards_G, torch.tensor([NAN, 1.0], dtype=torch.float64), equal_nan=True)
    assert (metrics["reward"].total, metrics["reward"].count) == (1.0, 1)
    assert metrics["rewards/format/abstained"].total == 1


def test_reward_functions_of_trl_get_the_messages():
    chat = replace(
        GROUP,
        prompt=replace(
            GROUP.prompt, problem=replace(GROUP.prompt.problem, prompt=[{"role": "user", "content": "4+2"}])
        ),
    )
    assert trl_arguments([chat], CONTEXT)["completions"] == [
        [
            {"role": "assistant", "content": "<t>"},
            {"role": "tool", "content": "6"},
            {"role": "assistant", "content": "\\boxed{6}"},
        ],
        [{"role": "assistant", "content": "\\boxed{7}"}],
    ]
    assert trl_arguments([GROUP], CONTEXT)["completions"] == ["\\boxed{6}", "\\boxed{7}"]
    failed = replace(chat, completions=(replace(TALK, failed="error", text=""), ALONE))
    last = trl_arguments([failed], CONTEXT)["completions"][0][-1]
    assert last == {"role": "assistant", "content": ""}, "a turn that failed holds no answer"


def test_completions_in_files_come_back_as_they_were():
    """Turns, failures, and NaN at observed ids, through JSON and tensors."""
    made = [TALK, ALONE, replace(TALK, entropies=None, failed="error", abstains=True)]
    facts = json.loads(json.dumps([completions.facts_of(one) for one in made]))
    ids = completions.flat_ids(made, torch.int32)
    assert completions.restored(facts, ids, completions.flat_logprobs(made, torch.float64)) == made
    assert completions.facts_of(ALONE) == {"tokens": 2, "finish": "stop", "text": "\\boxed{7}"}


def test_texts_of_a_graded_completion_are_those_of_its_turns():
    rule = StopRule(stop_ids={EOS}, stop_strings=(), max_new_tokens=8, tokenizer=tokenizer())
    ids = [ALPHABET.index(character) + 3 for character in "abc12"]
    turns = (Turn(written=2, observed=1, reply="c"), Turn(written=3))
    talk = Completion(token_ids=(*ids, EOS), logprobs=(0.0, 0.0, NAN, 0.0, 0.0, 0.0), finish="stop", turns=turns)
    graded = with_text(talk, rule)
    assert (graded.text, graded.transcript) == ("12", "abc12")
    assert with_text(replace(talk, failed="timeout"), rule).text == ""


@pytest.mark.parametrize("own_head", [False, True])
def test_the_entropy_service_is_nan_at_observed_ids_and_the_forwards_elsewhere(own_head):
    policy = load_policy(TinyConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64))
    model = LogprobModel(policy.model, temperature=1.0)
    model.own_head = own_head
    group = replace(GROUP, completions=(replace(TALK, entropies=None), TALK, ALONE), rewards_G=None)
    ((scored, kept, _),) = SampledEntropies(model, SamplingConfig(), token_budget=24)([group])
    with torch.no_grad():
        logprobs_TV = policy.model(torch.tensor([[1, 2, *TALK.token_ids]])).logits[0, 1:-1].log_softmax(-1)
    entropy_T, written_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1), torch.tensor(TALK.written_T)
    expected_T = entropy_T.where(written_T, NAN)
    torch.testing.assert_close(scored.entropy_T, expected_T, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert kept.collision_T[written_T].tolist() == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert bool(kept.collision_T[~written_T].isnan().all())


def from_logprobs(groups, options, context):
    """NaN at observed ids, as any function of their log-probs is."""
    return Advantages(
        values=[[torch.tensor(one.logprobs, dtype=torch.float64) for one in group.completions] for group in groups]
    )


def test_advantages_at_observed_ids_are_ignored():
    ((talk_T, alone_T),) = estimator_of(from_logprobs)([GROUP], Context()).values
    assert talk_T.tolist() == [-0.1, -0.2, -0.3, 0.0, 0.0, 0.0, -0.4, -0.5]
    assert alone_T.tolist() == [-1.0, -2.0]


def nan_where_the_model_wrote(groups, options, context):
    return Advantages(values=[[torch.full((len(ids),), NAN) for ids in group.completion_ids] for group in groups])


def test_a_value_that_is_not_finite_is_named_where_the_model_wrote():
    with pytest.raises(EstimatorError, match=r"completion 0: the value of token 0 is nan, .*\(5 of 8 are not\)"):
        estimator_of(nan_where_the_model_wrote)([GROUP], Context())


MASKS = {
    "a group short": [],
    "not bool": [[torch.ones(8), torch.ones(2)]],
    "too short": [[torch.ones(5, dtype=torch.bool), torch.ones(2, dtype=torch.bool)]],
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_of_an_estimator_are_checked(case):
    def masked(groups, options, context):
        masks = MASKS[case] or [[], []]
        return replace(from_logprobs(groups, options, context), masks=masks)

    with pytest.raises(EstimatorError, match="masks"):
        estimator_of(masked)([GROUP], Context())
