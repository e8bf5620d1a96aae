"""scripts/reproduce/rlp_fair.py: the order of its pieces, equal compute, and its table from numbers by hand."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rltrain import cli
from rltrain.registry import part_of

SCRIPTS = Path(__file__).parents[3] / "scripts" / "reproduce"


@pytest.fixture(scope="module")
def rlp_fair():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("rlp_fair")
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in ("rlp_fair", "league"):
            sys.modules.pop(name, None)


def test_required_pieces_run_first_and_an_arm_before_its_grpo(rlp_fair):
    order = rlp_fair.pieces([0, 1], [])
    required = len(rlp_fair.REQUIRED)
    assert [seed for seed, _ in order[: 2 * required]] == [0] * required + [1] * required
    for seed in (0, 1):
        names = [name for number, name in order if number == seed]
        assert names[0] == "start" and len(set(names)) == len(names)
        assert all(names.index(name.removeprefix("grpo_")) <= names.index(name) for name in names)
    assert rlp_fair.pieces([3], ["rlp"]) == [(3, "rlp")]


@pytest.mark.parametrize("experiment", ["rlp_automaton", "rlp_equations"])
def test_the_arms_read_the_documents_of_rlp(rlp_fair, experiment):
    """As many as RLP's steps take, each once; and the documents of every arm are those of the same data set."""
    setting = rlp_fair.SETTINGS[experiment]
    config = cli.compose([f"+experiment={experiment}"])
    assert (setting.rlp_steps, setting.documents) == (config.steps, config.steps * config.batch.prompts_per_step)
    words = rlp_fair.Seed(out=Path("out"), experiment=experiment, seed=3).words(
        f"data@cold_start_data={setting.words}", "cold_start_data.plain_share=1"
    )
    other = cli.compose(words)
    assert other.data.train_size == setting.documents and other.seed == 3
    plain, read = (part_of(each).function(each, "train")[7] for each in (other.cold_start_data, other.data))
    assert (plain.prompt, plain.thinks, read.thinks) == (read.prompt, False, True)


def test_the_table_has_means_and_paired_differences(rlp_fair, tmp_path):
    """RLP 30 and 40, no training 10 and 22: means 35 and 16, difference 19 with sd sqrt(2): 19 ± 12.706."""
    for seed, values in enumerate([(0.1, 0.3), (0.22, 0.4)]):
        for arm, sampled in zip(("start", "rlp"), values, strict=True):
            for how in ("thought", "direct"):
                folder = tmp_path / "rlp_automaton" / f"seed_{seed}" / arm / how
                folder.mkdir(parents=True)
                record = {"eval_accuracy": sampled, "greedy": {"eval_accuracy": 0.5}}
                (folder / "evaluation.json").write_text(json.dumps(record))
    measured = rlp_fair.measured_arms(tmp_path, "rlp_automaton", [0, 1, 2])
    lines = rlp_fair.table(measured).splitlines()[2:]
    assert [line.split(" | ")[:5] for line in lines] == [
        ["| no further training", "2", "16.0 %", "50.0 %", "16.0 %"],
        ["| RLP", "2", "35.0 %", "50.0 %", "35.0 %"],
    ]
    assert lines[0].split(" | ")[5] == "+19.0 (+6.3 to +31.7)"
    assert rlp_fair.difference(np.array([20.0, 18.0]))[0] == "+19.0 (+6.3 to +31.7)"
