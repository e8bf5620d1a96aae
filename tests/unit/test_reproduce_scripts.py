"""scripts/reproduce: what is run again, which traces a student gets, what the tables say."""

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "reproduce"
NAMES = ("several", "traces", "early_exit", "audit_by_date", "quickstart_seeds")


@pytest.fixture
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in NAMES:
            sys.modules.pop(name, None)


def test_what_is_done_is_not_run_again(script, tmp_path, capsys):
    (tmp_path / "a b").mkdir()
    assert script("several").main([f"'{tmp_path}/a b' train no=such", ""]) == 0
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match="x: trane is no command of rltrain; choose one of train, sft"):
        script("several").main(["x trane +experiment=quickstart"])


def test_the_first_command_that_fails_ends_the_rest(script, tmp_path, capfd):
    several = script("several")
    several.IMPORTED = ()  # 6 s of imports that this command does without
    missing = tmp_path / "no_run"
    assert several.main([f"{tmp_path}/{name} export {missing} --to {tmp_path}/{name}" for name in "ab"]) == 2
    out, errors = capfd.readouterr()
    assert out.split("  ")[:2] == ["1/2", f"{tmp_path}/a"] and "2/2" not in out
    assert str(missing) in errors
    assert not (tmp_path / "a").exists()
    assert several.main([f"{tmp_path}/mark train --help"]) == several.main([f"{tmp_path}/mark train no=such"]) == 0
    assert (tmp_path / "mark").exists(), "what is done is done, also where the command wrote another file"
    assert several.run(["help"]) == 1 and "No module named rltrain.help" in capfd.readouterr().err


def rows(name, ids):
    return [json.dumps({"id": f"p{i}", "solution": f"{name} {i}"}) for i in ids]


def test_a_mix_has_a_problem_once_and_half_of_each(script, tmp_path):
    traces = script("traces")
    written = {
        "teacher": rows("teacher", [0, 1, 2, 3, 5]),
        "friendly": rows("friendly", [1, 2, 3, 4]),
        "alone": rows("a", range(4)),
    }
    for name, lines in written.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "sft.jsonl").write_text("\n".join(lines) + "\n")
    traces.mix(tmp_path, 4)
    mixed = [json.loads(line) for line in (tmp_path / "mixed" / "first.jsonl").read_text().splitlines()]
    assert [row["solution"] for row in mixed] == ["teacher 1", "friendly 2", "teacher 3", "teacher 0"]
    assert (tmp_path / "teacher" / "first.jsonl").read_text().splitlines() == written["teacher"][:4]
    with pytest.raises(SystemExit, match="friendly: 4 right traces, 5 are wanted; set ASKED higher or KEPT lower"):
        traces.mix(tmp_path, 5)


def test_early_exits_are_averaged_over_seeds(script, tmp_path):
    for seed, share in enumerate((0.1, 0.2, 0.3)):
        folder = tmp_path / f"seed_{seed}" / "0.05"
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(json.dumps({"early_exit": {"exits": share}}))
    early_exit = script("early_exit")
    found = early_exit.by_delta(tmp_path)
    # t(2 degrees of freedom, 97.5 %) = 4.3027, sd 10, 10·4.3027/sqrt(3) = 24.8
    assert early_exit.cell([one["exits"] for one in found[0.05]]) == "20.0 % (-4.8 to 44.8)"


def test_the_audited_model_reads_questions_of_one_side(script, tmp_path):
    script("audit_by_date").main(tmp_path, 3)
    asked, seen, other = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("asked/test.jsonl", "seen/train.jsonl", "other/train.jsonl")
    )
    before = {row["question"] for row in asked if row["day"] < "2024-07"}
    assert len(asked) == 120 and len(before) == 60
    assert {row["question"] + row["rest"] for row in seen} == before
    assert not {row["question"] + row["rest"] for row in other} & {row["question"] for row in asked}
    a, b = (int(word) for word in asked[0]["question"].split() if word.isdecimal())
    assert int(asked[0]["answer"]) == a + b
