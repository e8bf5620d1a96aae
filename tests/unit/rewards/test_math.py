"""The verifier against its published cases, our own tables in five spirits, and arbitrary input."""

import json
import multiprocessing
import os
import random
import resource
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import verifier_hostile as hostile
import verifier_tables as tables
from hypothesis import given, settings
from hypothesis import strategies as st

from rltrain.rewards.math import MathConfig, Verdict, grade, math_reward, verify
from rltrain.rewards.verifier import cas
from rltrain.rewards.verifier.extract import boxes
from rltrain.types import Completion, Context, Group, Problem, Prompt

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "verifier_cases.json").read_text())
SPIRITS = ("LATEX", "NUMBERS", "STRUCTURES", "NEIGHBOURS")
STATUSES = {"ok", "no_answer", "parse_error", "timeout", "gold_error", "infra"}
# The whole fuzz has 20,000 outputs: RLTRAIN_FUZZ=20000 pytest tests/unit/rewards/test_math.py -k fuzz
FUZZ = int(os.environ.get("RLTRAIN_FUZZ", 1000))


def box(content):
    return rf"So \boxed{{{content}}}"


def boxed_cases():
    for name in SPIRITS:
        yield from ((name, gold, box(content), score) for gold, content, score in getattr(tables, name))
    yield from (("HOSTILE", gold, box(content), score) for gold, content, score in hostile.HOSTILE)
    yield from (("OUTPUTS", *case) for case in hostile.OUTPUTS)


@pytest.mark.parametrize("case", VECTORS, ids=range(len(VECTORS)))
def test_published_cases(case):
    output = case["output"]
    if output is None:
        output = "".join(text * count for text, count in case["output_parts"])
    assert verify(output, case["gold"]).score == case["expected"], case["note"]
    assert not Path("/tmp/pwned_mv").exists()


@pytest.mark.parametrize("case", VECTORS, ids=range(len(VECTORS)))
def test_golds_grade_themselves(case):
    expected = None if case["expected"] is None else 1.0
    assert verify(box(case["gold"]), case["gold"]).score == expected


def test_own_tables():
    failures = []
    for spirit, gold, output, score in boxed_cases():
        verdict = verify(output, gold)
        if verdict.score != score or verdict.status not in STATUSES:
            failures.append((spirit, gold[:60], output[:80], score, verdict))
    assert not failures


def test_tables_have_at_least_forty_cases_in_each_spirit():
    sizes = [len(getattr(tables, name)) for name in SPIRITS] + [len(hostile.HOSTILE), len(hostile.OUTPUTS)]
    assert min(sizes) >= 40


def test_table_golds_grade_themselves():
    golds = {gold for name in SPIRITS for gold, _, _ in getattr(tables, name)}
    assert [gold for gold in golds if verify(box(gold), gold).score != 1.0] == []


@pytest.mark.parametrize(("gold", "output", "score"), hostile.LENIENT)
def test_lenient_reads_answer_lines(gold, output, score):
    assert verify(output, gold, strict=False).score == score
    if "boxed" not in output:
        assert verify(output, gold).score == 0.0


@pytest.mark.parametrize("gold", hostile.UNGRADEABLE_GOLDS)
def test_ungradeable_golds_abstain_whatever_the_answer(gold):
    for output in (box("3"), box(gold), "no box"):
        verdict = verify(output, gold)
        assert (verdict.score, verdict.status) == (None, "gold_error")


def test_what_is_not_text_is_an_error_of_the_gold_or_no_answer():
    assert verify(None, "5") == Verdict(score=0.0, status="no_answer", extracted=None, reason="completion is not text")
    assert verify(box("5"), 5).status == "gold_error"


def test_presets_read_only_their_place():
    assert grade("work #### 1,234", "1234", extraction="gsm8k").score == 1.0
    assert grade(r"\boxed{1234}", "1234", extraction="gsm8k").score == 0.0
    assert grade("Final Answer: The final answer is $3$. I hope it is correct.", "3", extraction="minerva").score == 1.0
    assert grade("#### 3", "3", extraction="minerva").score == 0.0
    assert grade("#### 72", "5 * 14 = <<5*14=70>>70 and 2 more.\n#### 72", extraction="gsm8k").score == 1.0


def test_inequality_for_an_interval_only_with_the_flag():
    assert grade(box(r"x \ge 0"), r"[0,\infty)").score == 0.0
    assert grade(box(r"x \ge 0"), r"[0,\infty)", inequalities=True).score == 1.0
    assert grade(box(r"1 < x \le 2"), "(1,2]", inequalities=True).score == 1.0
    assert grade(box(r"x < 1 \text{ or } x > 2"), r"(-\infty,1)\cup(2,\infty)", inequalities=True).score == 1.0
    assert grade(box(r"x > 0"), r"[0,\infty)", inequalities=True).score == 0.0


def test_cas_is_asked_for_what_evaluation_cannot_tell():
    assert cas.warm(wait_s=60)
    assert verify(box(r"\mathbb{R}\setminus[0,1]"), r"(-\infty,0)\cup(1,\infty)").reason == "CAS: same"
    assert verify(box(r"\mathbb{R}\setminus[0,2]"), r"(-\infty,0)\cup(1,\infty)").reason == "CAS: different"


def test_boxes_in_one_pass():
    text = r"\boxed{a\boxed{b}} {x} \fbox 7, \boxed{\{} \boxed{open"
    assert [box.content for box in boxes(text)] == ["a{b}", "7,", r"\{", None]


def _pieces():
    latex = st.sampled_from(
        [
            r"\frac",
            r"\sqrt",
            r"\boxed{",
            "{",
            "}",
            r"\left(",
            r"\right)",
            "^",
            "_",
            "!",
            "9" * 40,
            "1e99",
            r"\text{",
            "(",
            ")",
            r"\begin{pmatrix}",
            r"\end{pmatrix}",
            "&",
            r"\\",
            r"\pm",
            r"\cup",
            ",",
            "=",
            "<",
            r"\%",
            "$",
            "x",
            "5",
            " ",
            ":",
            "<think>",
            "</think>",
            "**",
            "####",
            "Answer:",
            r"\,",
            "-",
            "/",
            ".",
            "or",
            "and",
            "[",
            "]",
            r"\{",
            r"\}",
            "|",
        ]
    )
    return st.lists(latex | st.text(max_size=8) | st.integers().map(str), max_size=40).map("".join)


@settings(max_examples=FUZZ)
@given(_pieces(), _pieces(), st.booleans())
def test_fuzz_never_raises_and_stays_bounded(inside, gold, strict):
    started = time.process_time()
    verdict = verify(box(inside), gold, strict=strict)
    assert time.process_time() - started < 1.0
    assert verdict.score in (0.0, 1.0, None) and verdict.status in STATUSES
    assert (verdict.score is None) == (verdict.status in ("gold_error", "infra")) or verdict.status == "timeout"


@settings(max_examples=FUZZ // 5)
@given(_pieces())
def test_fuzz_gradeable_golds_grade_themselves(gold):
    if "boxed" in gold or "####" in gold or "think" in gold:
        return
    verdict = verify(box(gold), gold)
    assert verdict.score in (1.0, None)
    assert verdict.score == 1.0 or verdict.status == "gold_error"


@settings(max_examples=FUZZ // 5)
@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_fuzz_rationals_equal_themselves_and_not_their_neighbours(top, bottom):
    gold = rf"\frac{{{top}}}{{{bottom}}}"
    assert verify(box(f"{top}/{bottom}"), gold).score == 1.0
    assert verify(box(f"{top + 1}/{bottom}"), gold).score == 0.0
    assert verify(box(f"{3 * top}/{3 * bottom}"), gold).score == 1.0


def test_random_bytes_of_every_length_are_bounded_in_memory():
    generator = random.Random(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for length in (0, 1, 511, 512, 513, 8191, 8192, 8193, 100_000):
        text = "".join(generator.choice(string.printable) for _ in range(length))
        assert verify(box(text), "5").score == 0.0
        assert verify(text + box("5"), "5").score == 1.0 or "</think>" in text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_from_a_fresh_process_and_from_threads():
    program = (
        "import threading\nfrom rltrain.rewards.math import verify\n"
        "from rltrain.rewards.verifier import cas\nscores = []\n"
        r"def one(): scores.append(verify(r'\boxed{\mathbb{R}\setminus[0,1]}', r'(-\infty,0)\cup(1,\infty)').score)"
        "\nassert cas.warm(wait_s=60)\nthreads = [threading.Thread(target=one) for _ in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\nprint(scores)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[1.0, 1.0, 1.0, 1.0]"


def _in_child(queue):
    assert cas.warm(wait_s=60)
    queue.put(verify(box(r"\mathbb{R}\setminus[2,3]"), r"(-\infty,2)\cup(3,\infty)").score)


def test_from_a_forked_process_while_a_child_is_alive():
    assert cas.warm(wait_s=60)
    assert verify(box(r"\mathbb{R}\setminus[2,3]"), r"(-\infty,2)\cup(3,\infty)").score == 1.0
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_in_child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == 1.0
    process.join(10)


def test_from_a_short_lived_thread_the_child_survives():
    assert cas.warm(wait_s=60)
    thread = threading.Thread(target=verify, args=(box(r"\mathbb{R}\setminus[3,4]"), r"(-\infty,3)\cup(4,\infty)"))
    thread.start()
    thread.join()
    assert verify(box(r"\mathbb{R}\setminus[3,5]"), r"(-\infty,3)\cup(4,\infty)").reason == "CAS: different"


def test_a_cold_child_is_not_waited_for_and_costs_no_item_its_verdict():
    program = (
        "import time\nfrom rltrain.rewards.math import verify\nfrom rltrain.rewards.verifier import cas\n"
        r"first = verify(r'\boxed{\mathbb{R}\setminus[0,1]}', r'(-\infty,0)\cup(1,\infty)')"
        "\nassert cas.warm(wait_s=60)\n"
        r"print(first.score in (None, 1.0), first.status in ('ok', 'timeout'), "
        r"verify(r'\boxed{\mathbb{R}\setminus[0,1]}', r'(-\infty,0)\cup(1,\infty)').reason)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "True True CAS: same"


def _group(texts, gold, prompt="q"):
    completions = tuple(Completion(token_ids=(1,), logprobs=(0.0,), finish="stop", text=text) for text in texts)
    return Group(
        prompt=Prompt(problem=Problem(id="p", prompt=prompt, answer=gold), token_ids=(1,)), completions=completions
    )


def test_reward_scores_and_metrics(tmp_path):
    path = tmp_path / "run" / "samples.jsonl"
    groups = [_group([box("5"), box("6"), "Answer: 5", box("{")], "5"), _group([box("1"), box("2")], "see figure")]
    result = math_reward(groups, MathConfig(samples_path=str(path)), Context(step=3))
    assert result.scores == [[1.0, 0.0, 0.0, 0.0], [None, None]]
    metrics = result.metrics
    assert metrics["verifier/ok"].total == 2 and metrics["verifier/ok"].count == 6
    assert metrics["verifier/gold_error"].total == 2 and metrics["verifier/no_answer"].total == 2
    assert (metrics["verifier/accuracy_of_extracted"].total, metrics["verifier/accuracy_of_extracted"].count) == (1, 2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["status"], row["lenient_is_right"]) for row in rows] == [
        (3, "no_answer", True), (3, "gold_error", False), (3, "gold_error", False)
    ]  # fmt: skip


def test_reward_knows_that_the_prompt_opened_the_thinking():
    groups = [_group([box("5"), "</think>" + box("5")], "5", prompt="q <think>\n")]
    assert math_reward(groups, MathConfig(), Context()).scores == [[0.0, 1.0]]


def test_batch_deadline_leaves_the_rest_ungraded():
    groups = [_group([box("5")] * 3, "5")]
    scores = math_reward(groups, MathConfig(batch_deadline_s=1e-9), Context())
    assert scores.scores == [[None, None, None]]
    assert scores.metrics["verifier/timeout"].total == 3
