"""reasoning_gym: no question in two splits, its own scores, and answers that its scorers cannot stand."""

import pytest

from rltrain import cli
from rltrain.data import reasoning_gym as data
from rltrain.errors import ConfigError
from rltrain.rewards.reasoning_gym import answer_in
from rltrain.types import Completion, Context, Group, Prompt

FAMILIES = ["chain_sum", "countdown", "leg_counting", "spell_backward"]


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("reasoning_gym")


def problems(split, **settings):
    return data.reasoning_gym_problems(data.ReasoningGymConfig(families=FAMILIES, train_size=40, **settings), split)


def test_a_hash_of_the_question_says_its_split():
    splits = [data.split_of_question(f"question {n}") for n in range(4000)]
    shares = {split: splits.count(split) / 4000 for split in ("train", "validation", "test")}
    assert shares == pytest.approx({"train": 0.5, "validation": 0.25, "test": 0.25}, abs=0.03)


def test_splits_are_disjoint_and_families_take_turns(library):
    train, test = problems("train"), problems("test", test_size=20)
    assert [problem.id.split("/")[0] for problem in train[:5]] == [*FAMILIES, FAMILIES[0]]
    questions = [problem.prompt for problem in (*train, *test)]
    assert len(set(questions)) == len(questions) == 60
    assert train == problems("train")  # the same again
    assert train[0].prompt != problems("train", seed=1)[0].prompt


def test_an_option_reaches_its_family(library):
    made = data.ReasoningGymConfig(families=["chain_sum"], train_size=3, options={"chain_sum": {"max_terms": 2}})
    assert all(problem.prompt.split("\n")[0].count(" + ") + problem.prompt.count(" - ") == 1
               for problem in data.reasoning_gym_problems(made, "train"))  # fmt: skip


def test_right_answers_have_their_score(library):
    groups = []
    for problem in problems("train")[:8]:
        texts = (f"so <answer>{problem.answer}</answer>", "<answer>nonsense</answer>", problem.answer)
        completions = tuple(Completion(token_ids=(1,), logprobs=(0.0,), finish="stop", text=text) for text in texts)
        groups.append(Group(prompt=Prompt(problem=problem, token_ids=(1,)), completions=completions))
    from rltrain.rewards.reasoning_gym import ReasoningGymRewardConfig, reasoning_gym_scores

    scores = reasoning_gym_scores(groups, ReasoningGymRewardConfig(), Context()).scores
    assert [row[0] for row in scores] == [1.0] * 8
    assert all(row[1] < 0.2 for row in scores)
    assert [row[2] for row in scores] == [0.0] * 8  # no tag


def test_an_answer_that_hangs_the_scorer_is_wrong(library, monkeypatch):
    """countdown's scorer gives the answer to sympy, which would compute the power."""
    from rltrain.rewards import reasoning_gym as rewards
    from rltrain.rewards.sandbox.pool import Limits, Pool

    pool = Pool(rewards.TARGET, deadline_s=1.0, item_cpu_s=1.0, prepare="prepare", limits=Limits(memory_mib=2048))
    monkeypatch.setattr(rewards, "_pool", lambda: pool)
    problem = next(each for each in problems("train") if each.id.startswith("countdown"))
    texts = ("<answer>9**9**9**9</answer>", f"<answer>{problem.answer}</answer>")
    completions = tuple(Completion(token_ids=(1,), logprobs=(0.0,), finish="stop", text=text) for text in texts)
    group = Group(prompt=Prompt(problem=problem, token_ids=(1,)), completions=completions)
    scored = rewards.reasoning_gym_scores([group], rewards.ReasoningGymRewardConfig(), Context())
    assert scored.scores == [[0.0, 1.0]]
    assert scored.metrics["reasoning_gym/scorer_failed"].total == 1.0
    pool.close()


@pytest.mark.parametrize(("text", "place", "answer"), [
    ("<answer>1</answer> no, <answer> 2\n</answer>", "tag", "2"),
    ("<think>a <answer>1</answer></think> <answer>3</answer>", "tag", "3"),
    ("<think><answer>1</answer>", "tag", None),
    ("1", "tag", None),
    ("so \\boxed{4}", "boxed", "4"),
    (" 5 ", "text", "5"),
    ("", "text", None),
])  # fmt: skip
def test_where_the_answer_stands(text, place, answer):
    assert answer_in(text, place) == answer


@pytest.mark.parametrize(("words", "message"), [
    (["data.families=[chain_summ]"], "data.families: the library has no chain_summ; did you mean chain_sum?"),
    (["+data.options.chain_sum.max_term=3"], "data.options.chain_sum={\"max_term\": 3}: the library refuses it"),
    (["+data.options.countdown.size=3"], "data.options.countdown: is not among data.families=['chain_sum']; add it"),
    (["data.families=[]"], "data.families=[]: names no family"),
    (["data.prompt=x"], "lacks the problem; add {question}"),
    (["data.test_size=0"], "data.test_size=0: an empty data set"),
])  # fmt: skip
def test_what_the_library_does_not_know_is_refused(library, words, message):
    with pytest.raises(ConfigError) as error:
        cli.compose(["data=reasoning_gym", "reward@rewards.answer=reasoning_gym", *words])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_family_that_is_exhausted_is_named(library):
    config = data.ReasoningGymConfig(families=["binary_matrix"], test_size=50, options={"binary_matrix": {
        "min_n": 1, "max_n": 1}})  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"data.test_size=50: binary_matrix gave \d+ different questions in 3200 draws"
    ):
        data.reasoning_gym_problems(config, "test")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"which is not installed; pip install 'rltrain\[reasoning_gym\]'"):
        data.ReasoningGymConfig()
