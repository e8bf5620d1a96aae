"""SPAE against the worked vectors, hand-computed numbers, its invariances, and two ranks against one."""

import json
import math
from pathlib import Path

import pytest
import torch

from rltrain.advantages.spae import SpaeConfig, spae, spae_advantages, step_potential
from rltrain.advantages.spae_steps import check_delimiter, split_steps
from rltrain.errors import ConfigError
from rltrain.policy.tiny import character_tokenizer
from rltrain.rollout.probe_types import ProbeResult, vocabulary
from rltrain.runtime import dist
from rltrain.types import Completion, Context, Group, Mean, Problem, Prompt

CASES = json.loads((Path(__file__).parents[2] / "vectors" / "spae.json").read_text())
PAPER = {"xi": 0.5, "alpha": 0.5, "eps_sat": 0.9}
TOKENIZER = character_tokenizer()


def column(case, key):
    return [[steps[key] for steps in group] for group in case["steps"]]


def arguments(case):
    return case["rewards"], *(column(case, key) for key in ("tokens", "acc", "conf", "tail_tokens"))


def flat(nested):
    return torch.cat([row_T for group in nested for row_T in group])


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
@pytest.mark.parametrize(("whiten", "key"), [(False, "advantages_before_whitening"), (True, "advantages")])
def test_vectors(case, whiten, key):
    values = spae_advantages(*arguments(case), **PAPER, whiten=whiten)
    rows = [row_T for group in values for row_T in group]
    for row_T, expected in zip(rows, case[key], strict=True):
        torch.testing.assert_close(row_T, float64(expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_vector_potentials(case):
    for steps in (steps for group in case["steps"] for steps in group):
        potential_K = step_potential(steps["acc"], steps["conf"])
        torch.testing.assert_close(potential_K, float64(steps["potential"]), atol=1e-12, rtol=0)


def test_potential_at_the_corners():
    assert step_potential([1, 0, 0, 1], [1, 1, 0, 0]).tolist() == [1.0, -1.0, 0.0, 0.5]


def test_one_completion_by_hand():
    """Phi = (0.95.., 0.95.., 0): jumps 0, 0, low; saturated steps before each: 0, 1, 2."""
    accuracy, confidence = [[[0.98, 0.98, 0.0], []]], [[[0.98, 0.98, 0.0], []]]
    [[first, second]] = spae_advantages(
        [[1.0, 0.0]], [[[1, 2, 1], []]], accuracy, confidence, [[1, 2]], **PAPER, whiten=False
    )
    mean = (2 * math.e + 1) / 3
    shrink = [1 - 0.5 * (1 - math.exp(-count)) for count in (0, 1, 2)]
    gain = [math.e - mean, math.e - mean, 1 - mean]
    one, two, three = (0.5 * f + 0.5 * g for f, g in zip(shrink, gain, strict=True))
    torch.testing.assert_close(first, float64([one, two, two, three, 0.5]), atol=1e-12, rtol=0)
    assert second.tolist() == [-0.5, -0.5]


def test_saturation_switch_leaves_negative_advantages_whole():
    case = CASES[0]
    plain = spae_advantages(*arguments(case), **PAPER | {"xi": 0.0}, whiten=False)[0]
    switched = spae_advantages(*arguments(case), **PAPER | {"xi": 0.0}, whiten=False, saturate_positive_only=True)[0]
    assert torch.equal(switched[0], plain[0])
    assert switched[1].unique().tolist() == [-0.5]
    assert plain[1].max() > -0.5


def test_whitened_tokens_have_mean_zero_and_population_std_one():
    values = flat(spae_advantages(*arguments(CASES[2]), **PAPER))
    assert abs(float(values.mean())) < 1e-12
    assert abs(float(values.std(correction=0)) - 1) < 1e-7


def test_equal_jumps_give_no_gain():
    values = spae_advantages(
        [[1.0, 0.0]], [[[2], [3]]], [[[0.4], [0.9]]], [[[0.1], [0.2]]], [[0, 0]], **PAPER, whiten=False
    )
    assert flat(values).tolist() == [0.5, 0.5, -0.5, -0.5, -0.5]


def test_rewards_may_shift_and_rows_may_be_permuted():
    rewards, *rest = arguments(CASES[1])
    base = spae_advantages(rewards, *rest, **PAPER)
    shifted = spae_advantages([[reward + 3 for reward in group] for group in rewards], *rest, **PAPER)
    torch.testing.assert_close(flat(shifted), flat(base), atol=1e-12, rtol=0)
    turned = spae_advantages(*([group[::-1] for group in one] for one in (rewards, *rest)), **PAPER)
    torch.testing.assert_close(flat([group[::-1] for group in turned]), flat(base), atol=1e-12, rtol=0)


def test_abstaining_completions_leave_every_statistic():
    rewards, tokens, accuracy, confidence, tails = ([[*group] for group in one] for one in arguments(CASES[1]))
    base = spae_advantages(rewards, tokens, accuracy, confidence, tails, **PAPER)
    for nested, value in zip((rewards, tokens, accuracy, confidence, tails), (None, [2], [1.0], [1.0], 3), strict=True):
        nested[0].insert(1, value)
    more = spae_advantages(rewards, tokens, accuracy, confidence, tails, **PAPER)
    assert more[0].pop(1).tolist() == [0.0] * 5
    assert torch.equal(flat(more), flat(base))


def test_no_groups_and_no_steps():
    assert spae_advantages([], [], [], [], [], **PAPER) == []
    [[first, second]] = spae_advantages([[1.0, 0.0]], [[[], []]], [[[], []]], [[[], []]], [[1, 1]], **PAPER)
    torch.testing.assert_close(torch.cat([first, second]), float64([1.0, -1.0]), atol=1e-7, rtol=0)


def test_lengths_that_disagree_are_an_error():
    with pytest.raises(ValueError, match="1 step_tokens but 2 accuracies"):
        spae_advantages([[1.0, 0.0]], [[[1], []]], [[[0.1, 0.2], []]], [[[0.1, 0.2], []]], [[1, 1]], **PAPER)
    with pytest.raises(ValueError, match="2 rewards, 1 step_tokens"):
        spae_advantages([[1.0, 0.0]], [[[1]]], [[[0.1]]], [[[0.1]]], [[1, 1]], **PAPER)


def _advantages_of_rank(rank, store, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    values = {}
    for case in CASES:
        # Rank 1 holds the second group, and none where there is one: it takes part all the same.
        mine = [one[:1] if rank == 0 else one[1:] for one in arguments(case)]
        values[case["name"]] = spae_advantages(*mine, **PAPER)
    torch.save(values, folder / f"{rank}.pt")
    dist.teardown()


def test_two_ranks_give_the_advantages_of_one(tmp_path):
    torch.multiprocessing.spawn(_advantages_of_rank, (tmp_path / "store", tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case in CASES:
        rows = [row_T for values in ranks for group in values[case["name"]] for row_T in group]
        for row_T, expected in zip(rows, case["advantages"], strict=True):
            torch.testing.assert_close(row_T, float64(expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("texts", "tokens", "tail", "think"),
    [
        (["a", ".\n\n", "b", "c.\n\n", "d"], (2, 2), 1, 5),
        (["a", ".\n\n", "</think>", "b.\n\n"], (2,), 2, 2),
        (["a", ".\n\n", "b", ".</", "think", ">", ".\n\n"], (2,), 5, 3),
        (["a", ".\n", "\n", ".\n\n "], (), 4, 4),
        (["a.\n\n"], (1,), 0, 1),
        ([], (), 0, 0),
    ],
)
def test_steps_end_at_tokens_whose_text_ends_in_the_delimiter(texts, tokens, tail, think):
    steps = split_steps(texts, delimiter=".\n\n", close="</think>", max_steps=64)
    assert (steps.step_tokens, steps.tail_tokens, steps.think_tokens_behind(0)) == (tokens, tail, think)


def test_more_steps_than_the_cap_are_merged_evenly_and_the_last_end_stays():
    steps = split_steps(["x\n"] * 10 + ["y"], delimiter="\n", close="</think>", max_steps=4)
    assert steps.step_tokens == (2, 3, 2, 3)
    assert steps.cuts == (2, 5, 7, 10)
    assert steps.tail_tokens == 1


def test_vocabulary_reads_every_id_by_itself():
    ids = TOKENIZER("<think>1+1=2\n</think>")["input_ids"]
    assert "".join(vocabulary(TOKENIZER)[token] for token in ids) == "<think>1+1=2\n</think>"


def test_a_delimiter_that_no_token_ends_in_is_refused():
    check_delimiter(TOKENIZER, "\n")
    with pytest.raises(ConfigError, match="no token of this vocabulary"):
        check_delimiter(TOKENIZER, ".\n\n")


class Table:
    """An engine that answers from a table and remembers what it was asked."""

    def __init__(self, accuracy):
        self.accuracy, self.requests, self.settings = accuracy, [], []

    def probe(self, requests, settings):
        self.requests += requests
        self.settings.append(settings)
        answers = [float64(self.accuracy[one.problem_id, one.sample_index][: len(one.cuts)]) for one in requests]
        return [ProbeResult(accuracy_K=answer, confidence_K=answer) for answer in answers]


def scored(problem_id, texts, rewards):
    completions = []
    for text in texts:
        ids = tuple(TOKENIZER(text)["input_ids"])
        completions.append(Completion(token_ids=ids, logprobs=(0.0,) * len(ids), finish="stop", text=text))
    problem = Problem(id=problem_id, prompt="?", answer="17")
    return Group(
        prompt=Prompt(problem=problem, token_ids=tuple(TOKENIZER("?")["input_ids"])),
        completions=tuple(completions),
        rewards_G=torch.tensor(rewards),
    )


ABSTAINS = float("nan")
GROUPS = [
    scored("equal", ["a\nb\n", "c\n"], [1.0, 1.0]),
    scored("mixed", ["ab\nc\nd\n</think>\n", "a\n\nb", "c", "d\ne\n"], [1.0, 0.0, 0.0, ABSTAINS]),
]
ACCURACY = {
    ("mixed", 0): [0.2, 0.99, 0.99],
    ("mixed", 1): [0.99, 0.1],
    ("mixed", 2): [],
    ("mixed", 3): [],
}


def run_spae(groups, prober, **options):
    config = SpaeConfig(delimiter="\n", probe="\\boxed{", logged_steps=3, **options)
    return spae(groups, config, Context(step=4, seed=9, tokenizer=TOKENIZER, rollout=prober))


def test_the_estimator_probes_step_ends_of_groups_with_a_signal():
    prober = Table(ACCURACY)
    result = run_spae(GROUPS, prober)
    assert [(one.problem_id, one.sample_index, one.cuts) for one in prober.requests] == [
        ("mixed", 0, (3, 5, 7)),
        ("mixed", 1, (2, 3)),
        ("mixed", 2, ()),
        ("mixed", 3, ()),
    ]
    [settings] = prober.settings
    assert (settings.seed, settings.step, settings.continuations, settings.max_tokens) == (9, 4, 5, 10)
    assert TOKENIZER.decode(settings.suffix_ids) == "\\boxed{"
    assert TOKENIZER.decode(prober.requests[0].answer_ids) == "17"

    assert flat([result.values[0]]).tolist() == [0.0] * 6
    probed = [[ACCURACY["mixed", index] for index in range(4)]]
    expected = spae_advantages(
        [[1.0, 0.0, 0.0, ABSTAINS]], [[[3, 2, 2], [2, 1], [], []]], probed, probed, [[2, 1, 1, 4]], **PAPER
    )
    for row_T, wanted in zip(result.values[1], expected[0], strict=True):
        assert torch.equal(row_T, wanted)


def test_notes_say_where_steps_end_and_what_their_probes_found():
    equal, mixed = run_spae(GROUPS, Table(ACCURACY)).notes
    assert equal == {}
    assert [list(row) for row in mixed["step_tokens"]] == [[3, 2, 2], [2, 1], [], []]
    probed = [ACCURACY["mixed", index] for index in range(4)]
    assert mixed["step_accuracy"] == mixed["step_confidence"] == probed
    assert mixed["step_potential"] == [step_potential(row, row).tolist() for row in probed]


def test_diagnostics_by_hand():
    metrics = run_spae(GROUPS, Table(ACCURACY)).metrics
    phi = {accuracy: 1.5 * accuracy**2 - 0.5 * accuracy for accuracy in (0.2, 0.99, 0.1)}
    expected = {
        "spae/solving_tokens": Mean(total=5, count=1),
        "spae/checking_tokens": Mean(total=2, count=1),
        "spae/right_to_wrong": Mean(total=1, count=3),
        "spae/right_to_wrong_of_saturated": Mean(total=1, count=2),
        "spae/steps": Mean(total=5, count=3),
        "spae/failed_step_fraction": Mean(total=0, count=3),
        "spae/potential/step_1": Mean(total=phi[0.2] + phi[0.99], count=2),
        "spae/potential/step_2": Mean(total=phi[0.99] + phi[0.1], count=2),
        "spae/potential/step_3": Mean(total=phi[0.99], count=1),
        "spae/potential/mean": Mean(total=phi[0.2] + 3 * phi[0.99] + phi[0.1], count=5),
    }
    found = {name: (metric.total, metric.count) for name, metric in metrics.items() if name != "timing_s/probe"}
    assert found == {name: pytest.approx((mean.total, mean.count)) for name, mean in expected.items()}


def test_a_batch_without_signal_is_all_zero_and_still_asks_the_engine():
    prober = Table({})
    result = run_spae(GROUPS[:1], prober)
    assert flat(result.values).tolist() == [0.0] * 6
    assert len(prober.settings) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xi": -1.0}, "advantage.xi"),
        ({"alpha": 1.5}, "advantage.alpha"),
        ({"delimiter": ""}, "advantage.delimiter"),
        ({"max_steps": 0}, "advantage.max_steps"),
        ({"probe": "The answer is "}, "advantage.probe"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SpaeConfig(**options)
