"""Scoring: sums, abstention, and users' functions that raise, hang, or return nonsense."""

import math
import os
import socket
import threading

import numpy as np
import pytest
import torch

from rltrain.errors import ConfigError
from rltrain.rewards import failures
from rltrain.rewards.custom import CustomRewardConfig
from rltrain.rewards.failures import RewardError, refuse_broken
from rltrain.rewards.format import FormatConfig
from rltrain.rewards.math import MathConfig
from rltrain.rewards.scoring import score
from rltrain.rewards.trl_function import TrlFunctionConfig, trl_arguments
from rltrain.runtime import dist
from rltrain.types import Completion, Context, Group, Need, Problem, Prompt, Scores

release = threading.Event()


def lengths(groups, options, context):
    return [[float(len(one.text)) for one in group.completions] for group in groups]


def as_scores(groups, options, context):
    return Scores(scores=[[options["value"]] * len(group.completions) for group in groups])


def with_notes(groups, options, context):
    rows = [float(len(one.text)) for one in groups[0].completions]
    return Scores(scores=[rows], notes=[{"halves": [[row / 2] for row in rows][: options.get("kept")]}])


def raises(groups, options, context):
    raise KeyError("no such column")


def leaves(groups, options, context):
    raise SystemExit(1)


def hangs(groups, options, context):
    release.wait(60)
    return lengths(groups, options, context)


def too_few(groups, options, context):
    return [[1.0] for _ in groups]


def one_number(groups, options, context):
    return 1.0


def nonsense(groups, options, context):
    return [[math.nan, math.inf, None, "x", 2.0, 10**400] for _ in groups]


def trl_first_digit(prompts, completions, completion_ids, *, answer, level, **columns):
    assert isinstance(completions[0], str) and len(prompts) == len(completion_ids) == len(level)
    return [float(a in text) if b == "easy" else None for text, a, b in zip(completions, answer, level, strict=True)]


def trl_too_few(prompts, completions, completion_ids, **columns):
    return [1.0]


def whatever(groups, options, context):
    return options["value"]


def level_of(group):
    return group.prompt.problem.meta["level"]


def raises_deeper(groups, options, context):
    return [[level_of(groups[0])]]


def two_arguments(groups, context):
    return []


def trl_nothing(prompts, completions, **columns):
    pass


def trl_yields(prompts, completions, **columns):
    yield 1.0


def trl_text(prompts, completions, **columns):
    return "10"


def trl_keys(prompts, completions, **columns):
    return {1.0: "right", 0.0: "wrong"}


def group(texts, answer="5", **meta):
    completions = tuple(Completion(token_ids=(7, 8), logprobs=(0.0, 0.0), finish="stop", text=text) for text in texts)
    problem = Problem(id="p", prompt="q", answer=answer, meta=meta)
    return Group(prompt=Prompt(problem=problem, token_ids=(1,)), completions=completions)


def user(name, **fields):
    return CustomRewardConfig(import_path=f"{__name__}:{name}", **fields)


def value(metric):
    return metric.total / metric.count


RIGHT, WRONG = r"\boxed{5}", r"\boxed{6}"


def test_weighted_sum_with_named_unweighted_parts():
    groups = [group([RIGHT, WRONG, "no"]), group([RIGHT, RIGHT, RIGHT]), group([WRONG, WRONG, WRONG])]
    rewards = {"answer": MathConfig(weight=2.0), "length": user("lengths", weight=0.1)}
    scored, metrics = score(groups, rewards, Context())
    assert scored[0].rewards_G.tolist() == pytest.approx([2.9, 0.9, 0.2])
    assert scored[0].reward_parts["answer"].tolist() == [1, 0, 0]
    assert scored[0].reward_parts["length"].tolist() == [9, 9, 2]
    assert scored[0].rewards_G.dtype == torch.float64
    assert value(metrics["rewards/answer/mean"]) == pytest.approx(4 / 9)
    assert metrics["rewards/answer/std"].value == pytest.approx(math.sqrt(9 / 8 * 4 / 9 * 5 / 9))
    assert value(metrics["reward"]) == pytest.approx((2.9 + 0.9 + 0.2 + 3 * 2.9 + 3 * 0.9) / 9)
    assert [value(metrics[f"groups/{name}"]) for name in ("all_right", "all_wrong", "mixed")] == pytest.approx(
        [1 / 3] * 3
    )
    assert value(metrics["frac_reward_zero_std"]) == pytest.approx(2 / 3)
    assert value(metrics["reward_std"]) == pytest.approx(float(scored[0].rewards_G.std()) / 3)
    assert metrics["rewards/length/errors"].total == 0


def test_a_reward_that_abstains_on_a_whole_group_does_not_apply_to_it():
    rewards = {"answer": MathConfig(), "format": FormatConfig(tags=["think"], weight=0.5)}
    texts = [rf"<think>a</think>{RIGHT}", RIGHT]
    scored, metrics = score([group(texts), group(texts, answer="see figure")], rewards, Context())
    assert scored[0].rewards_G.tolist() == [1.5, 1.0]
    assert scored[1].rewards_G.tolist() == [0.5, 0.0]
    assert scored[1].reward_parts["answer"].isnan().all()
    assert value(metrics["rewards/answer/abstained"]) == 0.5
    alone, metrics = score([group(texts, answer="see figure")], {"answer": MathConfig()}, Context())
    assert alone[0].rewards_G.isnan().all() and metrics["reward"].count == 0 == metrics["reward_std"].count


FORM = "; give one list of scores per group"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, f"returned None{FORM}"),
        (1.0, f"returned a float{FORM}"),
        ("right", f"returned a str{FORM}"),
        ({"p": [1.0, 0.0]}, f"returned a dict{FORM}"),
        (([1.0, 0.0] for _ in range(1)), f"returned a generator{FORM}"),
        ([1.0], f"returned a list whose entry 0 is a float{FORM}"),
        ([None], f"returned a list whose entry 0 is None{FORM}"),
        ({0.0, 1.0}, f"returned a set{FORM}"),
        (b"10", f"returned a bytes{FORM}"),
        (["10"], f"returned a list whose entry 0 is a str{FORM}"),
        ([b"10"], f"returned a list whose entry 0 is a bytes{FORM}"),
        ([{0: 1.0, 1: 0.5}], f"returned a list whose entry 0 is a dict{FORM}"),
        ([{0.0, 1.0}], f"returned a list whose entry 0 is a set{FORM}"),
        ([(1.0 for _ in range(2))], f"returned a list whose entry 0 is a generator{FORM}"),
        ([[1.0], [0.0]], "returned [1, 1] scores per group, expected [2]"),
        ([[1.0, 0.0, 0.0]], "returned [3] scores per group, expected [2]"),
        (
            Scores(scores=[[1.0, 0.0]], metrics={"share": 0.5}),
            "returned metrics['share'] as a float; give Mean.of(…)",
        ),
        (
            Scores(scores=[[1.0, 0.0]], notes=[{"halves": [[0.5]]}]),
            "returned notes that do not fit; give one list per completion of every group, or none",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_list_of_scores_per_group_is_named(returned, message, caplog):
    scored, metrics = score([group(["a", "b"])], {"mine": user("whatever", options={"value": returned})}, Context())
    assert scored[0].rewards_G.isnan().all() and metrics["rewards/mine/errors"].total == 2
    assert caplog.messages == [f"reward mine failed on a batch of 1 groups, which abstain: {message}"]


@pytest.mark.parametrize("scores", [torch.tensor([[1.0, 0.25]]), np.array([[1.0, 0.25]]), ((1.0, 0.25),)])
def test_arrays_and_tuples_are_scores_too(scores):
    scored, _ = score([group(["a", "b"])], {"mine": user("whatever", options={"value": scores})}, Context())
    assert scored[0].rewards_G.tolist() == [1.0, 0.25]


def test_a_reward_that_raises_shows_its_own_traceback_once(caplog):
    rewards = {"mine": user("raises_deeper")}
    for _ in range(3):
        score([group(["a"])], rewards, Context())
    tracebacks = [text for text in caplog.messages if "Traceback" in text]
    assert len(tracebacks) == 1 and len(caplog.messages) == 1 + 3
    lines = tracebacks[0].splitlines()
    assert lines[0] == "reward mine raised:" and lines[-1] == "KeyError: 'level'"
    assert [line.split(", in ")[1] for line in lines if line.startswith("  File")] == ["raises_deeper", "level_of"]
    assert "reward mine failed on a batch of 1 groups, which abstain: KeyError: 'level'" in caplog.messages[1]


def test_a_run_ends_where_the_last_call_of_a_reward_failed_from_end_to_end():
    groups = [group(["ab", "abc"])]
    for name, cause in (
        ("raises", "KeyError: 'no such column'"),
        ("leaves", "SystemExit: 1"),
        ("one_number", f"returned a float{FORM}"),
    ):
        rewards = {"answer": MathConfig(), "mine": user(name)}
        score(groups, rewards, Context())
        with pytest.raises(RewardError) as caught:
            refuse_broken(rewards)
        assert str(caught.value) == (
            f"reward mine: failed on every completion of the first step ({cause}); "
            "mend the function, or leave the reward out"
        )
        score(groups, {"mine": user("lengths")}, Context())
        refuse_broken(rewards)  # it has worked since
    score([group(["a"] * 6)], {"mine": user("nonsense")}, Context())
    refuse_broken(["mine"])  # single completions failed
    release.clear()
    score(groups, {"stuck": user("hangs", deadline_s=0.2)}, Context())
    release.set()
    refuse_broken(["stuck", "never_called"])  # a server may come back


def test_a_function_of_other_arguments_is_refused_when_the_config_is_made():
    with pytest.raises(ConfigError) as caught:
        user("two_arguments")
    path = f"{__name__}:two_arguments"
    assert str(caught.value) == (
        f"reward.import_path={path}: takes (groups, context); give it the arguments (groups, options, context)"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trl_nothing", "returned a NoneType, expected a list of 2 rewards"),
        ("trl_yields", "returned a generator, expec"),
        ("trl_text", "returned a str, expected a list of 2 rewards"),
        ("trl_keys", "returned a dict, expected a list of 2 rewards"),
    ],
)
def test_a_trl_function_that_returns_no_list_is_named(name, message, caplog):
    score([group(["5", "6"])], {"mine": TrlFunctionConfig(import_path=f"{__name__}:{name}")}, Context())
    assert f"which abstain: TypeError: {__name__}:{name} {message}" in caplog.messages[-1]


@pytest.mark.parametrize("name", ["raises", "leaves", "too_few", "one_number"])
def test_a_failing_function_is_counted_and_its_batch_abstains(name, caplog):
    rewards = {"answer": MathConfig(), "mine": user(name)}
    scored, metrics = score([group([RIGHT, WRONG])], rewards, Context())
    assert scored[0].rewards_G.isnan().all()
    assert scored[0].reward_parts["answer"].tolist() == [1.0, 0.0]
    assert metrics["rewards/mine/errors"].total == 2 and metrics["rewards/mine/timeouts"].total == 0
    assert "reward mine failed" in caplog.text


def test_notes_of_rewards_stay_with_their_group():
    scored, _ = score([group(["a", "bcd"])], {"answer": MathConfig(), "mine": user("with_notes")}, Context())
    assert scored[0].notes == {"halves": [[0.5], [1.5]]}
    short, metrics = score([group(["a", "bcd"])], {"mine": user("with_notes", options={"kept": 1})}, Context())
    assert short[0].notes == {} and metrics["rewards/mine/errors"].total == 2


def test_values_that_are_no_finite_numbers_abstain_one_by_one():
    scored, metrics = score([group(["a"] * 6)], {"mine": user("nonsense")}, Context())
    assert [math.isnan(one) for one in scored[0].rewards_G.tolist()] == [True, True, True, True, False, True]
    assert metrics["rewards/mine/errors"].total == 4
    assert metrics["rewards/mine/abstained"].total == 5


def test_a_hanging_function_abstains_and_never_runs_twice():
    release.clear()
    rewards = {"slow": user("hangs", deadline_s=0.2)}
    before = threading.active_count()
    for _ in range(3):
        scored, metrics = score([group(["ab", "abc"])], rewards, Context())
        assert scored[0].rewards_G.isnan().all()
        assert metrics["rewards/slow/timeouts"].total == 2 and metrics["rewards/slow/errors"].total == 0
    assert threading.active_count() == before + 1
    release.set()
    for thread in threading.enumerate():
        if thread.name == "reward-slow":
            thread.join(10)
    assert score([group(["ab", "abc"])], rewards, Context())[0][0].rewards_G.tolist() == [2.0, 3.0]


def test_scores_record_and_options():
    scored, _ = score([group(["a", "b"])], {"mine": user("as_scores", options={"value": 0.25})}, Context())
    assert scored[0].rewards_G.tolist() == [0.25, 0.25]


def test_trl_functions_run_unchanged():
    groups = [group(["5", "6"], level="easy"), group(["5", "6"], level="hard")]
    config = TrlFunctionConfig(import_path=f"{__name__}:trl_first_digit")
    scored, metrics = score(groups, {"mine": config}, Context())
    assert scored[0].rewards_G.tolist() == [1.0, 0.0]
    assert scored[1].rewards_G.isnan().all()
    assert metrics["rewards/mine/errors"].total == 0
    _, metrics = score(groups, {"mine": TrlFunctionConfig(import_path=f"{__name__}:trl_too_few")}, Context())
    assert metrics["rewards/mine/errors"].total == 4


def test_trl_gets_chat_completions_for_chat_prompts():
    chat = Problem(id="p", prompt=[{"role": "user", "content": "q"}], answer="5")
    one = Group(prompt=Prompt(problem=chat, token_ids=(1,)), completions=group(["x"]).completions)
    arguments = trl_arguments([one], Context())
    assert arguments["completions"] == [[{"role": "assistant", "content": "x"}]]
    assert arguments["completion_ids"] == [[7, 8]] and arguments["solution"] == ["5"]


def test_trl_gets_columns_of_meta_as_they_are():
    meta = {"answer": ["5", "6"], "level": {"of": 3}, "image": b"\xff", "solution": 7.0}
    raw = Problem(id="p", prompt="q", answer="", meta=meta)
    text = Problem(id="t", prompt="q", answer="5")
    groups = [
        Group(prompt=Prompt(problem=one, token_ids=(1,)), completions=group(["x"]).completions) for one in (raw, text)
    ]
    arguments = trl_arguments(groups, Context())
    assert arguments["answer"] == [["5", "6"], "5"]
    assert arguments["solution"] == [7.0, "5"]
    assert arguments["level"] == [{"of": 3}, None]
    assert arguments["image"] == [b"\xff", None]


def test_trls_own_reward_runs_here():
    config = TrlFunctionConfig(import_path="trl.rewards:think_format_reward")
    problem = Problem(id="p", prompt=[{"role": "user", "content": "q"}], answer="5")
    texts = ["<think>a</think>b", "b"]
    one = Group(prompt=Prompt(problem=problem, token_ids=(1,)), completions=group(texts).completions)
    scored, _ = score([one], {"format": config}, Context())
    assert scored[0].rewards_G.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("path", ["nocolon", "no_such_module:f", "math:no_such", "math:pi"])
def test_wrong_import_paths_are_refused_at_once(path):
    with pytest.raises(ConfigError, match="reward.import_path="):
        CustomRewardConfig(import_path=path)


def _refused_on_a_rank(rank, port, folder, causes):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.setup(deadline_s=60)
    outcomes = []
    for of_ranks in causes:
        failures.note("mine", of_ranks[rank])
        try:
            failures.refuse_broken(["mine"])
            outcomes.append("goes on")
        except RewardError as error:
            outcomes.append(str(error))
    (folder / str(rank)).write_text("\n".join(outcomes))
    dist.teardown()


def test_a_reward_that_fails_on_some_ranks_does_not_end_the_run(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    causes = [("its server is down", ""), ("", ""), ("its server is down", "KeyError: 'level'")]
    torch.multiprocessing.spawn(_refused_on_a_rank, (port, tmp_path, causes), nprocs=2)
    ended = (
        "reward mine: failed on every completion of the first step (its server is down); mend the function, or leave"
    )
    for rank in range(2):
        outcomes = (tmp_path / str(rank)).read_text().splitlines()
        assert outcomes == ["goes on", "goes on", f"{ended} the reward out"]


def fails_with_a_service(groups, options, context):
    raise RuntimeError("inside the scorer")


fails_with_a_service.needs = {Need.SCORER}


def threads_name(groups, options, context):
    return [[float(threading.current_thread() is threading.main_thread())] * len(g.completions) for g in groups]


def test_a_function_with_a_service_runs_in_the_main_thread(monkeypatch):
    """All ranks use a service together; a thread that a deadline leaves behind would use it alone."""
    alone, _ = score([group(["a"])], {"mine": user("threads_name")}, Context())
    monkeypatch.setattr(threads_name, "needs", {Need.SCORER}, raising=False)
    together, _ = score([group(["a"])], {"mine": user("threads_name")}, Context())
    assert (alone[0].rewards_G.tolist(), together[0].rewards_G.tolist()) == ([0.0], [1.0])


def test_a_function_that_raises_beside_a_service_ends_every_rank(monkeypatch):
    scored, _ = score([group(["a"])], {"mine": user("fails_with_a_service")}, Context())
    assert scored[0].rewards_G.isnan().all()
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    with pytest.raises(RewardError, match="reward mine: raised RuntimeError.* where all ranks score together"):
        score([group(["a"])], {"mine": user("fails_with_a_service")}, Context())
