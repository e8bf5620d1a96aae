"""The console: lines and bars within the terminal, whose logs are heard, and all of it undone."""

import logging
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest

from rltrain.runtime import progress


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05"), (-1, "0:00")]
)
def test_clock(seconds, text):
    assert progress.clock(seconds) == text


@pytest.fixture
def at_once(monkeypatch):
    """The clock stands 65 s after the start, and goes on only by what a test sets."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_screen", progress._Screen(start_s=935.0))
    return now


def test_lines_stand_under_each_other(at_once, capsys):
    progress.say("cold start", "first\nsecond")
    assert capsys.readouterr().err == "   1:05  cold start  first\n" + " " * 21 + "second\n"


def test_other_ranks_say_nothing(at_once, capsys):
    progress.begin(shows=False)
    progress.say("rl", "hidden")
    progress.Bar("rl", 2).update(1)
    assert capsys.readouterr().err == ""


def test_a_bar_elsewhere_is_a_line_now_and_then(at_once, capsys):
    bar = progress.Bar("cold start", 10, every_s=5.0)
    for done in range(1, 11):
        at_once[0] += 2.0
        bar.update(done, [f"loss {done}"])
    at_once[0] += 6.0
    bar.update(10, ["loss 10"])  # while the process that trained ends
    assert capsys.readouterr().err.splitlines() == [  # after 6, 12 and 18 s, and at the end
        "   1:11  cold start  step 3/10  loss 3  ETA 0:14",
        "   1:17  cold start  step 6/10  loss 6  ETA 0:08",
        "   1:23  cold start  step 9/10  loss 9  ETA 0:02",
        "   1:25  cold start  step 10/10  loss 10  ETA 0:00",
    ]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_bar_fits_the_terminal(at_once, columns):
    bar = progress.Bar("rl", 1000, done=100)
    at_once[0] += 60.0
    fields = ["reward 0.6125", "acc 0.7125", "len 1023.5", "ent 0.4125", "grad 0.1125", "tok/s 12345"]
    bar.update(400, fields)
    text = bar.text(columns)
    assert len(text) <= columns
    assert text.startswith("   2:05  rl          ━━━━────── 40"[:columns])
    assert ("ETA 2:00" in text, "acc 0.7125" in text, "grad" in text) == (columns > 40, columns > 40, columns > 80)


def record(name: str, path: str, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord(name, level, path, 1, "%s", ("text",), None)


LIBRARY = str(Path(sysconfig.get_paths()["purelib"]) / "somewhere/file.py")


@pytest.mark.parametrize(("name", "path", "of_library"), [
    ("somewhere", LIBRARY, True),
    ("py.warnings", LIBRARY, True),
    ("asyncio", sysconfig.get_paths()["stdlib"] + "/asyncio/tasks.py", True),
    ("py.warnings", "<frozen importlib>", True),
    ("rltrain.rewards", LIBRARY, False),  # an installed rltrain
    ("my_reward", "/home/me/my_reward.py", False),
])  # fmt: skip
def test_whose_record_it_is(name, path, of_library):
    assert progress.is_of_library(record(name, path)) == of_library


@pytest.mark.parametrize(("verbose", "heard"), [(False, 3), (True, 4)])
def test_libraries_are_heard_from_errors_on(capsys, verbose, heard):
    with progress.set_up(verbose=verbose):
        for name, path, level in [("library", LIBRARY, 30), ("rltrain.ours", LIBRARY, 20), ("mine", "/x/mine.py", 30)]:
            logging.getLogger(name).handle(record(name, path, level))
        logging.getLogger("error").handle(record("error", LIBRARY, logging.ERROR))
    assert len(capsys.readouterr().err.splitlines()) == heard


def test_warnings_of_a_users_file_are_shown_and_those_of_libraries_kept(capsys):
    kept = []
    handler = logging.Handler()
    handler.emit = kept.append
    with progress.set_up():
        logging.getLogger().addHandler(handler)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = progress._log_warning
            warnings.warn_explicit("old", FutureWarning, LIBRARY, 3)
            warnings.warn_explicit("odd", UserWarning, "/home/me/mine.py", 7)
    assert [each.getMessage() for each in kept] == ["FutureWarning: old", "UserWarning: odd"]
    assert "UserWarning: odd" in (shown := capsys.readouterr().err) and "FutureWarning" not in shown


def test_everything_is_as_it_was_after_the_block():
    root, before = logging.getLogger(), warnings.showwarning
    handlers, level = root.handlers[:], root.level
    with progress.set_up():
        assert root.handlers != handlers
    assert (root.handlers, root.level, warnings.showwarning) == (handlers, level, before)


def test_the_first_line_needs_no_torch():
    code = "import sys; from rltrain import train; from rltrain.runtime import progress; progress.say('start', 'x')"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True).returncode == 0
