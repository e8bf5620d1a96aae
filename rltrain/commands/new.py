"""A part of yours to begin from: a file of about twenty lines, its test, and the command that trains with it.

python -m rltrain.commands.new estimator|reward|loss|environment|data NAME [--folder .]

NAME.py and test_NAME.py are written into the folder, which must not hold them. Run the test with pytest there.
"""

from __future__ import annotations

import argparse
import keyword
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rltrain import cli
from rltrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Scaffold:
    """The texts of a kind of part; NAME stands for its name. ``command`` trains with it."""

    code: str
    test: str
    command: str


ESTIMATOR = Scaffold(
    code='''"""NAME: all credit of a completion to its last tokens. Change ``row``; the test says what must hold."""

import torch

from rltrain.advantages.group import group_advantages
from rltrain.types import Advantages


def NAME(groups, options, context):
    """One value per completion token. ``options`` are those of ``advantage.options``, here ``tokens``."""
    values = []
    for group in groups:
        advantages_G = group_advantages(group.rewards_G)
        rows = []
        for ids, advantage in zip(group.completion_ids, advantages_G, strict=True):
            row = torch.zeros(len(ids), dtype=torch.float64)
            row[-options.get("tokens", 8) :] = advantage
            rows.append(row)
        values.append(rows)
    return Advantages(values=values)
''',
    test='''"""NAME on a group of two completions, whose advantages are worked out by hand."""

import torch
from NAME import NAME

from rltrain.types import Completion, Context, Group, Problem, Prompt


def test_NAME():
    completions = tuple(Completion(token_ids=(1,) * n, logprobs=(0.0,) * n, finish="stop") for n in (3, 1))
    prompt = Prompt(problem=Problem(id="a", prompt="", answer=""), token_ids=(1,))
    group = Group(prompt=prompt, completions=completions, rewards_G=torch.tensor([1.0, 0.0]))
    (rows,) = NAME([group], {"tokens": 2}, Context()).values
    share = 0.5 / (0.5**0.5 + 1e-6)  # (1 - mean) / (std + eps), std of 1 and 0 with ddof 1
    assert torch.allclose(rows[0], torch.tensor([0.0, share, share], dtype=torch.float64))
    assert torch.allclose(rows[1], torch.tensor([-share], dtype=torch.float64))
''',
    command="python -m rltrain.train +experiment=quickstart advantage=custom advantage.import_path=NAME:NAME",
)
REWARD = Scaffold(
    code='''"""NAME: 1 for an empty completion, 0 for the longest. Change the formula, and the test with it."""


def NAME(groups, options, context):
    """A score per completion, by group; None abstains. ``options`` are those of ``rewards.NAME.options``."""
    longest = options.get("tokens", context.max_new_tokens)
    return [[max(0.0, 1.0 - len(each.token_ids) / longest) for each in group.completions] for group in groups]
''',
    test='''"""NAME on completions of known length."""

from NAME import NAME

from rltrain.types import Completion, Context, Group, Problem, Prompt


def test_NAME():
    completions = tuple(Completion(token_ids=(1,) * n, logprobs=(0.0,) * n, finish="stop") for n in (2, 4, 10))
    prompt = Prompt(problem=Problem(id="a", prompt="", answer=""), token_ids=(1,))
    group = Group(prompt=prompt, completions=completions)
    assert NAME([group], {"tokens": 8}, Context()) == [[0.75, 0.5, 0.0]]
''',
    command="python -m rltrain.train +experiment=quickstart +reward@rewards.NAME=custom "
    "rewards.NAME.import_path=NAME:NAME rewards.NAME.weight=0.1",
)
LOSS = Scaffold(
    code='''"""NAME: the ratio without a clip. Change the term; weights, KL and entropy are added around it."""

from rltrain.losses.ratios import log_ratios
from rltrain.losses.terms import LossTerms


def NAME(logprobs_N, batch, options):
    """A term per token, to be minimised. ``options`` are those of ``loss.options``, here ``scale``."""
    ratio_N = log_ratios(logprobs_N, batch).exp()
    return LossTerms(loss_N=-options.get("scale", 1.0) * ratio_N * batch.advantages_N)
''',
    test='''"""NAME on two tokens, whose terms are worked out by hand."""

import math

import torch
from NAME import NAME

from rltrain.types import TokenBatch


def test_NAME():
    old_N = torch.tensor([math.log(0.5), math.log(0.2)])
    new_N = torch.tensor([math.log(0.25), math.log(0.4)])  # ratios 0.5 and 2
    tokens_N, ones_N = torch.tensor([0, 1]), torch.ones(2)
    batch = TokenBatch(
        input_ids_L=torch.zeros(3, dtype=torch.long), positions_L=torch.arange(3), boundaries_S1=torch.tensor([0, 3]),
        source_N=tokens_N, sequence_N=torch.zeros(2, dtype=torch.long), targets_N=tokens_N, weights_N=ones_N,
        advantages_N=torch.tensor([1.0, -3.0]), sampler_logprobs_N=old_N, old_logprobs_N=old_N,
    )  # fmt: skip
    assert torch.allclose(NAME(new_N, batch, {}).loss_N, torch.tensor([-0.5, 6.0]))
''',
    command="python -m rltrain.train +experiment=quickstart loss=custom loss.import_path=NAME:NAME "
    "loss.separable_tokens=true",
)
ENVIRONMENT = Scaffold(
    code='''"""NAME: a wrong answer gets a second try. Change ``respond``; the test says what must hold."""

from rltrain.types import Environment, Reply


class NAME(Environment):
    """``start`` gives the state of a problem, ``respond`` answers a turn of the model. States are of JSON's types."""

    stop = ("}",)  # what ends a turn, beside the end of the text

    def __init__(self, tries=2):
        self.tries = tries  # environment.options.tries

    def start(self, problem):
        return {"answer": problem.answer, "left": self.tries - 1}

    def respond(self, state, text):
        right = text.rstrip().endswith("{" + state["answer"] + "}")
        if right or not state["left"]:
            return Reply(text="", state=state, done=True, reward=float(right))
        return Reply(text="no\\n", state=state | {"left": state["left"] - 1})
''',
    test='''"""NAME: a right answer, and two wrong ones."""

from NAME import NAME

from rltrain.types import Problem, Reply


def test_NAME():
    game = NAME(tries=2)
    first = game.start(Problem(id="a", prompt="3+4", answer="7"))
    assert first == {"answer": "7", "left": 1}
    assert game.respond(first, "\\\\boxed{7}") == Reply(text="", state=first, done=True, reward=1.0)
    second = game.respond(first, "\\\\boxed{8}")
    assert second == Reply(text="no\\n", state={"answer": "7", "left": 0})
    assert game.respond(second.state, "\\\\boxed{9}") == Reply(text="", state=second.state, done=True, reward=0.0)
''',
    command="python -m rltrain.train +experiment=quickstart environment=custom environment.import_path=NAME:NAME "
    "environment.reply_tokens=8",
)
DATA = Scaffold(
    code='''"""NAME: problems with their answers as JSONL, a line each. ``python NAME.py`` writes NAME.jsonl."""

import json
from pathlib import Path


def rows():
    """Sums of two digits. ``solution`` is for a cold start."""
    for left in range(10):
        for right in range(10):
            total = str(left + right)
            yield {"question": f"{left}+{right}=", "answer": total, "solution": f"\\\\boxed{{{total}}}"}


def write(path):
    """One JSON object a line."""
    Path(path).write_text("".join(json.dumps(row) + "\\n" for row in rows()), encoding="utf-8")


if __name__ == "__main__":
    write("NAME.jsonl")
''',
    test='''"""NAME as rltrain reads it: problems, answers, and a split held out."""

from NAME import rows, write

from rltrain.data.hub import HubConfig, hub


def test_NAME(tmp_path):
    write(tmp_path / "NAME.jsonl")
    config = HubConfig(path=str(tmp_path / "NAME.jsonl"), prompt="{question}", answer="answer")
    train, *held_out = (hub(config, split) for split in ("train", "validation", "test"))
    assert len(train) + sum(map(len, held_out)) == len(list(rows())) == 100 and all(map(len, held_out))
    sums = [sum(map(int, problem.prompt.rstrip("=").split("+"))) for problem in train]
    assert [str(total) for total in sums] == [problem.answer for problem in train]
''',
    command="python NAME.py && python -m rltrain.train name=NAME data=hub data.path=NAME.jsonl "
    "'data.prompt=\"{question}\"' +data.meta.solution=solution reward@rewards.answer=boxed cold_start.steps=200 "
    "sampling.max_new_tokens=16 optimizer.learning_rate=1e-4 evaluation.problems=5",
)
SCAFFOLDS = {"estimator": ESTIMATOR, "reward": REWARD, "loss": LOSS, "environment": ENVIRONMENT, "data": DATA}


def write(kind: str, name: str, folder: Path) -> Scaffold:
    """Write the two files and return their texts and the command. ConfigError for a name that cannot be used."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(f"rltrain new {kind} {name}: not a name of Python; write letters, digits and underscores")
    filled = Scaffold(**{key: text.replace("NAME", name) for key, text in vars(SCAFFOLDS[kind]).items()})
    files = {folder / f"{name}.py": filled.code, folder / f"test_{name}.py": filled.test}
    if there := next((path for path in files if path.exists()), None):
        raise ConfigError(f"{there}: is there already; choose another name or folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return filled


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    head, _, rest = (__doc__ or "").partition("\n")
    made = argparse.ArgumentParser(
        prog="rltrain new", description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("kind", choices=list(SCAFFOLDS))
    made.add_argument("name", metavar="NAME")
    made.add_argument("--folder", type=Path, default=Path())
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files and say how to go on."""
    options = parser().parse_args(arguments)
    filled = write(options.kind, options.name, options.folder)
    print(f"written: {options.folder / options.name}.py and test_{options.name}.py; run in this folder:")
    print(f"  python -m pytest test_{options.name}.py")
    print(f"  PYTHONPATH=. {filled.command}")


if __name__ == "__main__":
    with cli.errors_in_one_line():
        main()
