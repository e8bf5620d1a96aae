"""Search by BM25 over a corpus of three documents, whose scores are worked out by the formula."""

import json
import math

import pytest

from rltrain.errors import ConfigError
from rltrain.types import Problem, Reply

ROWS = [
    {"title": "Peru", "text": "Lima is the capital of Peru."},
    {"title": "Chile", "text": "Santiago is the capital of Chile, a long country."},
    {"text": "Llamas live in Peru and in Chile"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" if not isinstance(row, str) else f"{row}\n" for row in rows))
    return path


@pytest.fixture
def search(tmp_path):
    pytest.importorskip("bm25s")
    from rltrain.environments.search import Search, SearchConfig

    return Search(SearchConfig(corpus=str(write(tmp_path / "corpus.jsonl", ROWS)), results=2, answer_reward=0.5))


def test_scores_are_bm25(search):
    """Sum over words of log(1 + (N - n + 0.5)/(n + 0.5)) · f/(f + k1·(1 - b + b·length/mean))."""
    lengths = [len(document.words) for document in search.documents]
    assert lengths == [7, 10, 7]

    def score(count, having, length):
        rarity = math.log(1 + (3 - having + 0.5) / (having + 0.5))
        return rarity * count / (count + 1.5 * (0.25 + 0.75 * length / 8))

    scores = search.index.get_scores(["capital", "peru"])
    expected = [score(1, 2, 7) + score(2, 2, 7), score(1, 2, 10), score(1, 2, 7)]
    assert scores.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_best_documents_are_shown(search):
    state = search.start(Problem(id="a", prompt="?", answer="Lima"))
    reply = search.respond(state, "<search>The Capital of PERU?</search>")
    assert reply == Reply(
        text="<result>Peru: Lima is the capital of Peru.\n"
        "Chile: Santiago is the capital of Chile, a long country.</result>",
        state={"answer": "Lima", "seen": [[0, 1]]}, called=True, reward=0.5,
    )  # fmt: skip
    nothing = search.respond(reply.state, "<search>quark</search>")
    assert nothing.text == "<result>nothing was found</result>" and nothing.reward == 0.0
    assert search.key(nothing.state) == "[[0, 1], []]"
    assert search.respond(state, "Lima").done


def test_equal_scores_keep_the_order_of_the_file(tmp_path, search):
    twins = write(tmp_path / "twins.jsonl", [{"text": "a b"}, {"text": "c d"}, {"text": "a b"}, {"text": "a b"}])
    made = type(search)(type(search.config)(corpus=str(twins), results=2))
    assert made.best("a") == [0, 2]


@pytest.mark.parametrize(("rows", "message"), [
    ([{"text": "a"}, {"text": " "}], "line 2 has no text under 'text'; set environment.text_field, or mend the row"),
    ([{"body": "a"}], "line 1 has no text under 'text'"),
    (["[1]"], "line 1 has no text under 'text'"),
    (["{"], "line 1 is not JSON; give one object a line"),
    ([], "holds no document; give one JSON object a line"),
])  # fmt: skip
def test_a_row_without_text_is_named(tmp_path, rows, message):
    from rltrain.environments.search import read_documents

    with pytest.raises(ConfigError) as error:
        read_documents(str(write(tmp_path / "corpus.jsonl", rows)), "text", "title")
    assert message in str(error.value)


def test_a_missing_file_is_named():
    from rltrain.environments.search import read_documents

    with pytest.raises(ConfigError, match="environment.corpus=none.jsonl: no such file"):
        read_documents("none.jsonl", "text", "title")


def test_a_missing_library_is_named(monkeypatch):
    from rltrain.environments import search

    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs the library bm25s, which is not installed; pip install 'rltrain\[search\]'"
    ):
        search.SearchConfig(corpus="corpus.jsonl")
