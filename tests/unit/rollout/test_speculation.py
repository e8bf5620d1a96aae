"""Speculation changes no token, no log-prob beyond rounding, and not the distribution; it does save steps."""

import copy
import itertools

import pytest
import torch
from local_engine import EOS, PAD, PROMPTS, VOCABULARY, engine, ids, model, plain_logprobs, prompts

from rltrain.config import SamplingConfig
from rltrain.errors import ConfigError
from rltrain.rollout.local import LocalRolloutConfig
from rltrain.rollout.shared_prompt_decoder import SharedDecoder
from rltrain.rollout.speculation import GroupDrafts, RecycledTokens, accepted


def test_a_guess_is_what_last_followed_the_longest_common_end():
    first, second = [7, 8, 9, 4], [5, 6]
    drafts = GroupDrafts([1, 2, 3], [first, second])
    assert drafts.guess(1, 3) == [0, 0, 0]  # 6 was seen nowhere before
    second += [7, 8]
    assert drafts.guess(1, 3) == [9, 4, 0]  # as in the first completion
    second += [2]
    assert drafts.guess(1, 2) == [3, 5]  # as in its own prompt, which was read last
    second += [3, 5, 6, 7, 8]
    assert drafts.guess(1, 4) == [2, 3, 5, 6]  # its own 6 7 8 rather than the 7 8 of the first
    assert drafts.guess(0, 2) == [0, 0]


def test_a_recycled_guess_is_the_most_frequent_of_the_last_successors():
    table, row = RecycledTokens(), []
    table.watch([1, 2, 1, 3, 1, 2], [row])
    assert table.guess(1, 3) == [2, 1, 2]  # 1 was followed by 2, 3, 2; 2 by 1
    assert table.guess(3, 2) == [1, 2]
    assert table.guess(9, 2) == [0, 0]  # was seen nowhere
    row += [5, 1, 3]
    table.refresh()
    assert table.guess(1, 1) == [3]  # 2, 3, 2, 3: as frequent, and newer
    assert table.guess(2, 2) == [5, 1]  # 1 once, then 5, the first token behind the prompt
    row += [1, 7] * 5
    table.refresh()
    assert table.guess(1, 2) == [7, 1]  # the last 8 are 2, 3, 3 and 7 five times: older ones are forgotten
    table.watch([1, 2, 1, 3, 1, 2], [row])  # a row that was sent back and starts again
    table.refresh()
    assert table.guess(1, 2) == [7, 1]
    assert table.guess(3, 1) == [1]


def test_sampled_tokens_hold_up_to_the_first_wrong_guess():
    fed = torch.tensor([[9, 1, 2, 3], [9, 1, 2, 3], [9, 1, 2, 3], [9, 1, 2, 3]])
    sampled = torch.tensor([[1, 2, 3, 7], [1, 2, 0, 7], [0, 2, 3, 7], [1, 0, 3, 7]])
    assert accepted(fed, sampled).tolist() == [4, 3, 1, 2]
    assert accepted(fed[:, :1], sampled[:, :1]).tolist() == [1] * 4


@pytest.mark.parametrize(("name", "temperature", "source"), [
    *[(name, temperature, "prompt") for name in ("qwen3", "llama", "gemma2", "gpt2") for temperature in (0.3, 1.0)],
    ("qwen3", 1.0, "recycling"), ("llama", 0.3, "recycling"),
])  # fmt: skip
def test_no_token_changes(name, temperature, source):
    sampling = SamplingConfig(max_new_tokens=24, temperature=temperature)
    expected = engine(name).generate(PROMPTS, step=5, group_size=4, sampling=sampling)
    lookers = [{"compact_share": 0.01}, {"compact_share": 1.0}, {"max_rows": 6, "speculate_rows": 3}]
    for (tokens, rows), extra in zip(((1, 64), (4, 64), (8, 5)), lookers, strict=True):
        rollout = engine(
            name, **({"speculate_tokens": tokens, "speculate_rows": rows, "speculate_from": source} | extra)
        )
        groups = rollout.generate(PROMPTS, step=5, group_size=4, sampling=sampling)
        assert ids(groups) == ids(expected)
    for group in groups:
        for completion in group.completions:
            exact = plain_logprobs(model(name), group.prompt, completion.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs).double(), exact, atol=2e-5, rtol=0)


@pytest.mark.parametrize("source", ["prompt", "recycling"])
def test_it_begins_when_few_rows_are_left_and_saves_steps(monkeypatch, source):
    fed = []
    for method in ("step", "verify"):
        original = getattr(SharedDecoder, method)

        def counted(self, tokens, original=original, method=method):
            fed.append((method, len(tokens)))
            return original(self, tokens)

        monkeypatch.setattr(SharedDecoder, method, counted)
    greedy = SamplingConfig(max_new_tokens=64, temperature=0.0)
    lengths = {}
    for tokens in (0, 8):
        chosen = {"speculate_from": source} if tokens else {}
        rollout = engine("llama", stop_ids=(EOS,), speculate_tokens=tokens, speculate_rows=10, **chosen)
        groups = rollout.generate(PROMPTS, step=0, group_size=2, sampling=greedy)
        lengths[tokens] = (ids(groups), len(fed))
        if tokens:
            assert {rows <= 10 for method, rows in fed if method == "verify"} == {True}
        fed.clear()
    assert lengths[0][0] == lengths[8][0]
    assert lengths[8][1] < 0.8 * lengths[0][1]


def test_pairs_of_tokens_follow_their_distribution():
    """Chi-square of 4000 completions of two tokens, the second of which is guessed from those before."""
    rollout = engine(speculate_tokens=2, speculate_rows=4000, max_rows=4000)
    sampling = SamplingConfig(max_new_tokens=3)
    group = rollout.generate(PROMPTS[:1], step=0, group_size=4000, sampling=sampling)[0]
    pairs = [found[:2] for found in group.completion_ids if len(found) >= 2]
    size = VOCABULARY["vocab_size"]
    likely = [pair for pair in itertools.product(range(size), repeat=2) if pair[0] != EOS]
    sequences = torch.tensor([PROMPTS[0].token_ids + pair for pair in likely])
    network = model("qwen3").eval()
    with torch.no_grad():
        logits = network(input_ids=sequences, use_cache=False).logits[:, -3:-1].double().log_softmax(-1)
    network.train()
    exact = logits.gather(-1, sequences[:, -2:, None]).sum((1, 2)).exp() * 4000
    counts = torch.zeros(size, size).index_put_(tuple(torch.tensor(pairs).T), torch.ones(len(pairs)), accumulate=True)
    observed = torch.tensor([float(counts[pair]) for pair in likely])
    common = exact >= 5
    rest = torch.tensor([float(exact[~common].sum())])
    chi_square = ((observed - exact)[common] ** 2 / exact[common]).sum()
    chi_square += ((observed[~common].sum() - rest) ** 2 / rest).sum()
    degrees = float(common.sum())
    assert degrees > 50 and abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
def test_logits_with_holes_are_those_of_a_plain_forward(name, monkeypatch):
    """Rejected tokens in every row, rows that join and leave among holes, and holes that are closed."""
    closed = []
    close = SharedDecoder._close_holes
    monkeypatch.setattr(SharedDecoder, "_close_holes", lambda self: (closed.append(self._columns), close(self)))
    network = copy.deepcopy(model(name)).eval()
    decoder = SharedDecoder(network, pad_id=PAD, max_new_tokens=100)
    draw = torch.Generator().manual_seed(0)

    def random(high, *shape):
        return torch.randint(1, high, shape, generator=draw)

    def admitted(prompts):
        decoder.admit([prompt.token_ids for prompt in prompts], 2)
        return [list(prompt.token_ids) for prompt in prompts for _ in range(2)]

    with torch.no_grad():
        texts = admitted(PROMPTS[:2])
        for step in range(24):
            fed = random(VOCABULARY["vocab_size"], len(texts), 6)
            counts = random(4 if step % 3 else 2, len(texts))
            logits = decoder.verify(fed)
            decoder.accept(counts)
            for text, own, tokens, count in zip(texts, logits, fed.tolist(), counts.tolist(), strict=True):
                text += tokens[:count]
                exact = network(input_ids=torch.tensor([text]), use_cache=False).logits[0, -count:]
                torch.testing.assert_close(own[:count], exact, atol=5e-5, rtol=0)
            if step == 6:
                texts += admitted(PROMPTS[2:4])
            if step == 12:
                decoder.keep([1, 2, 4, 5, 6])
                texts = [texts[row] for row in (1, 2, 4, 5, 6)]
        fed = random(VOCABULARY["vocab_size"], len(texts))
        for text, own, token in zip(texts, decoder.step(fed), fed.tolist(), strict=True):
            exact = network(input_ids=torch.tensor([[*text, token]]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(own, exact, atol=5e-5, rtol=0)
    assert closed and all(columns > 30 for columns in closed)


def test_no_position_past_the_end_of_a_learned_table():
    """Prompts and completions fill it; rows of other ages and guesses would run over."""
    asked = prompts(*(f"what is {a} + {b} ? "[:16] * 6 for a in range(4) for b in range(4)))
    sampling = SamplingConfig(max_new_tokens=128 - len(asked[0].token_ids))
    assert model("gpt2").config.max_position_embeddings == 128 and sampling.max_new_tokens == 32
    exact = engine("gpt2", check_steps=1, compact_share=0.01).generate(asked, step=0, group_size=3, sampling=sampling)
    lengths = [len(found) for group in exact for found in group.completion_ids]
    assert min(lengths) < 16 and max(lengths) == 32
    for settings in (
        {"speculate_tokens": 8, "speculate_rows": 64, "compact_share": 1.0},
        {"max_rows": 6, "compact_share": 0.3, "check_steps": 16},
    ):
        groups = engine("gpt2", **settings).generate(asked, step=0, group_size=3, sampling=sampling)
        assert ids(groups) == ids(exact)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match=r"rollout.speculate_tokens=9: must lie in 0..8; 0 is off"):
        LocalRolloutConfig(speculate_tokens=9)
    with pytest.raises(ConfigError, match=r"rollout.speculate_from=recycling with rollout.speculate_tokens=0: guesses"):
        LocalRolloutConfig(speculate_from="recycling")
    with pytest.raises(ConfigError, match=r"rollout.speculate_from=memory: unknown; set one of prompt, recycling"):
        LocalRolloutConfig(speculate_tokens=2, speculate_from="memory")
    with pytest.raises(ConfigError, match="MambaForCausalLM cannot take back a token that it was fed"):
        engine("mamba", speculate_tokens=2)
