"""The report in a real headless Chromium: desktop and phone, light and dark, mouse and keyboard, hostile text."""

import json
import os
import shutil

import pytest
import turn_groups

from rltrain.report import page as report
from rltrain.runs import run_folder

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: chromium)")

HOSTILE = "<script>alert(1)</script>"
IMAGE = "<img src=x onerror=\"document.title='hit'\">"
# Two steps and a tail; the second group has a token that is as wide as a phone.
TOKENS = ["3", "+", "4", "\n", HOSTILE, IMAGE, "<eos>"]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


def row(problem, sample, reward, tokens, **columns):
    count = len(tokens)
    return {
        "step": 8,
        "problem_id": problem,
        "sample": sample,
        "prompt": f"What is 3+4? {HOSTILE}",
        "prompt_ids": [1, 2],
        "completion": "".join(tokens),
        "answer": f"7{IMAGE}",
        "finish": "stop",
        "reward": reward,
        "reward/answer": reward,
        "token_ids": [10 + sum(map(ord, token)) for token in tokens],
        "tokens": tokens,
        "logprobs": [-0.25 * (t + 1) for t in range(count)],
        "advantages": [(1.5 if reward else -0.5) / (t + 1) for t in range(count)],
        "note/step_tokens": [4, 2],
        "note/step_potential": [0.25, 0.75 if reward else -0.5],
        "note/position": [],
        "note/target_tokens": [],
        "note/target_gain": [],
        **columns,
    }


def samples():
    gains = {"note/step_tokens": [], "note/step_potential": [], "note/position": [5], "note/target_tokens": [HOSTILE]}
    long = ["x" * 400, *(f" word{i}" for i in range(300))]
    return [
        row("first", 0, 1.0, TOKENS),
        row("first", 1, 0.0, [*TOKENS[:2], "5", "\n", "8", "!", "<eos>"]),
        row("first", 2, 0.0, TOKENS[::-1]),
        row("second", 0, 1.0, long, **gains, **{"note/target_gain": [0.5]}),
        row("second", 1, 0.5, long[:40], **gains, **{"note/target_gain": [-1.25]}),
        *(row("third", sample, 0.0, TOKENS[:6] if sample == 1 else TOKENS) for sample in range(4)),
    ]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / f"run {HOSTILE.replace('/', '_')}"
    run_folder.write_samples(folder, "step_000008", samples())
    for step, right in ((0, 0.0), (8, 1.0)):
        run_folder.write_samples(folder, f"eval_step_{step:06d}", [row("held_out", 0, right, TOKENS)])
    lines = [{"step": 0, "eval_accuracy": 0.0}]
    lines += [{"step": s, "reward": s / 10, "timing_s/rollout": 2.0, "timing_s/train": 1.0} for s in range(1, 40)]
    lines += [{"step": 40, "eval_accuracy": 1.0, f"rewards/{HOSTILE}/errors": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder.parent / "report.html"
    out.write_text(report.build([folder], estimators=["grpo", "tempo"]), encoding="utf-8")
    return out.as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # Chromium's own sandbox refuses to start as root.
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        running = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield running
        running.close()


class Opened:
    """A page, and everything it said or asked for."""

    def __init__(self, browser, address, size, scheme):
        width, height = SIZES[size]
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.said, self.asked, self.dialogs = [], [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.goto(address)

    def panel(self):
        """What the panel says, by name."""
        names, values = (self.page.locator(f"#inspector {tag}").all_text_contents() for tag in ("dt", "dd"))
        return dict(zip(names, values, strict=True))

    def focused(self):
        return self.page.evaluate(
            "(({dataset, parentElement}) => [parentElement.dataset.c, dataset.t])(document.activeElement)"
        )


@pytest.fixture
def opened(browser, address):
    one = Opened(browser, address, "desktop", "light")
    yield one
    one.page.close()


BEYOND = """[...document.querySelectorAll("body *")]
    .filter(one => one.getBoundingClientRect().right > innerWidth + 1 && !one.closest(".scroll"))
    .map(one => one.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_opens_without_errors_and_without_overflow(browser, address, size, scheme):
    one = Opened(browser, address, size, scheme)
    for summary in one.page.locator("summary").all():
        summary.click()
    for group in ("0", "1"):
        one.page.select_option("#group", group)
        assert one.page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        assert one.page.evaluate(BEYOND) == []
    assert one.said == [] and one.dialogs == []
    assert one.asked == [address] or set(one.asked) == {address, "data:,"}
    one.page.close()


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLOURS = """selector => {
    const numbers = text => text.match(/[\\d.]+/g).map(Number);
    const style = getComputedStyle(document.querySelector(selector));
    return [style.color, style.backgroundColor, getComputedStyle(document.body).backgroundColor].map(numbers);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_the_strongest_colours(browser, address, scheme):
    """WCAG's contrast of at least 4.5 : 1, the tint laid over the paper."""
    one = Opened(browser, address, "desktop", scheme)
    for selector in ('[data-c="0"] .up', '[data-c="1"] .down', ".hint", ".warning", "a"):
        ink, tint, paper = one.page.evaluate(COLOURS, selector)
        opacity = tint[3] if len(tint) == 4 else 1.0
        ground = [opacity * a + (1 - opacity) * b for a, b in zip(tint[:3], paper[:3], strict=True)]
        assert contrast(ink[:3], ground) >= 4.5, selector
    one.page.close()


def test_pointing_at_a_token_shows_its_numbers(opened):
    opened.page.hover('[data-c="0"] [data-t="2"] >> nth=0')
    assert opened.panel() == {
        "token": "4",
        "place": "3 of 7, completion 0",
        "log-prob": "-0.75 (p = 0.472)",
        "prefix-tree value before → after": "0.5 → 1",  # "3+" is shared by a right and a wrong completion
        "advantage, advantage (as trained)": "+0.5",
        "step, advantage (as trained)": "1 of 2, potential 0.25",
        "advantage, grpo": "+1.15",  # (1 - 1/3) / sqrt(1/3)
        "advantage, tempo": "+2.02",  # (1 - 1/3 + 1/2) / sqrt(1/3)
    }
    assert opened.page.locator(".t.here").count() == 3, "the token is marked in every column"
    opened.page.hover('[data-c="1"] [data-t="6"] >> nth=0')
    assert opened.panel()["step, advantage (as trained)"] == "in none (tail)"


def test_arrow_keys_go_through_tokens_and_completions(opened):
    opened.page.focus("#own-scale")
    opened.page.keyboard.press("Tab")
    assert opened.focused() == ["0", "0"]
    for key, place in (("ArrowRight", "1"), ("ArrowRight", "2"), ("ArrowLeft", "1"), ("End", "6"), ("ArrowRight", "6")):
        opened.page.keyboard.press(key)
        assert opened.focused() == ["0", place]
    opened.page.keyboard.press("ArrowDown")
    assert opened.focused() == ["1", "6"]
    assert opened.panel()["place"] == "7 of 7, completion 1"
    opened.page.keyboard.press("ArrowUp")
    opened.page.keyboard.press("Home")
    assert opened.focused() == ["0", "0"]
    assert opened.panel()["token"] == "3"
    outline = opened.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    opened.page.keyboard.press("Tab")
    assert opened.focused() == ["0", "0"], "one tab stop per column: the next estimator's"


def test_the_tree_and_the_potentials_answer_to_mouse_and_keyboard(opened):
    labels = opened.page.locator("[data-branch]").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert labels == [
        "3 completions, value 0.333",
        "2 completions, value 0.5",
        "completion 0, value 1",
        "completion 1, value 0",
        "completion 2, value 0",
    ]
    opened.page.focus('[data-branch="2"]')
    assert opened.panel()["prefix-tree value before → after"] == "0.5 → 1"
    opened.page.hover('[data-branch="1"]')
    assert opened.panel()["text"] == "3+"
    opened.page.focus('[aria-label="completion 0, step 2, potential 0.75"]')
    assert opened.panel() == {
        "completion": "0", "step": "2", "potential": "0.75", "reward": "1", "text": HOSTILE + IMAGE.replace(" ", "␣"),
    }  # fmt: skip


def test_information_gain_is_shown_per_thought_and_position(opened):
    opened.page.click("#next")
    cells = opened.page.locator(".gains td").all_text_contents()
    assert cells == ["+0.5", "+0.5", "-1.25", "-1.25"]
    assert opened.page.locator(".gains th code").all_text_contents() == [HOSTILE]
    assert opened.page.locator("[aria-label^='gain against'] circle").count() == 2
    for group in ("2", "0"):
        opened.page.click("#next")
        assert opened.page.input_value("#group") == group


def test_equal_completions_are_shown_once(opened):
    opened.page.select_option("#group", "2")
    assert opened.page.locator("#group option >> nth=2").text_content().split(" · ")[1:3] == ["step 8", "0 of 4 right"]
    headings = [one.text_content() for one in opened.page.locator(".completion h4").all()]
    assert headings == [
        "3 ×completions 0, 2, 3: reward.answer = 0 · stop · 7 tokens",
        "completion 1: reward.answer = 0 · stop · 6 tokens",
    ]
    opened.page.hover('[data-c="0"] [data-t="2"] >> nth=0')
    assert opened.panel()["place"] == "3 of 7, completions 0, 2, 3"


def test_estimators_share_a_scale_unless_asked_otherwise(opened):
    scales = opened.page.locator(".scale")
    assert [one.get_attribute("aria-label") for one in scales.all()] == ["colours from -2.02 to +2.02"] * 3
    opened.page.check("#own-scale")
    assert [one.get_attribute("aria-label") for one in scales.all()] == [
        f"colours from -{largest} to +{largest}" for largest in ("1.5", "1.15", "2.02")
    ]


def test_model_output_is_text(opened):
    assert opened.page.locator('[data-c="0"] [data-t="4"]').first.text_content() == HOSTILE
    assert opened.page.locator('[data-c="0"] [data-t="5"]').first.text_content() == IMAGE
    opened.page.hover('[data-c="0"] [data-t="5"] >> nth=0')
    assert opened.panel()["token"] == IMAGE.replace(" ", "␣")
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator("script").count() == 2
    assert opened.dialogs == [] and opened.said == []
    assert opened.page.title().startswith("run <script>alert(1)")


EXCHANGES = turn_groups.called(), turn_groups.answered(), turn_groups.failed()


def turned_rows(made):
    return run_folder.sample_rows(1, [made], turn_groups.advantages(made), turn_groups.Letters())


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A page on completions over turns."""
    folder, made = tmp_path_factory.mktemp("turns"), turn_groups.group(*EXCHANGES)
    run_folder.write_samples(folder, "step_000001", turned_rows(made))
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n')
    out = folder / "report.html"
    out.write_text(report.build([folder], estimators=["grpo"]), encoding="utf-8")
    return out.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_an_environment_wrote_and_where_turns_begin(browser, told, scheme):
    one = Opened(browser, told, "desktop", scheme)
    column = one.page.locator('.completion [data-c="0"]').first
    assert column.locator(".t").all_text_contents() == ["a", "b", "c", "d"]
    assert column.locator(".observed").all_text_contents() == ["c"]
    lines = one.page.locator(".estimates > div:first-child [data-turn]").evaluate_all(
        "all => all.map(token => token.dataset.turn)"
    )
    assert lines == [
        "turn 1 · calls · reward +0.5",
        "turn 2",
        "turn 1",
        "turn 1 · calls · reward -1 · failed: error",
        "turn 2 · calls · failed: timeout",
    ]
    one.page.hover('[data-c="0"] [data-t="2"] >> nth=0')
    panel = one.panel()
    assert (panel["turn"], panel["log-prob"]) == ("1 of 2, observed, calls, reward +0.5", "–")
    assert panel["advantage, grpo"] == "–"
    ink, tint, paper = one.page.evaluate(COLOURS, ".tokens .observed")
    ground = [tint[3] * a + (1 - tint[3]) * b for a, b in zip(tint[:3], paper[:3], strict=True)]
    assert contrast(ink[:3], ground) >= 4.5
    assert one.said == []
    one.page.close()
