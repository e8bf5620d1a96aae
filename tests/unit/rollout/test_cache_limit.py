"""A bounded cache: what fits, who is sent back when it is full, and that no token, log-prob or entropy changes."""

import pytest
import torch
from local_engine import PROMPTS, engine, ids, model, plain_logprobs

from rltrain.config import SamplingConfig
from rltrain.errors import ConfigError
from rltrain.rollout.cache_limit import free_bytes, limit_tokens, refuse_small_cache, token_bytes
from rltrain.rollout.shared_prompt_decoder import SharedDecoder

LONGEST = max(len(prompt.token_ids) for prompt in PROMPTS)


def test_what_free_memory_holds():
    """llama: 2 layers, keys and values, H_kv heads of D numbers in fp32."""
    network = model("llama")
    config = network.config
    assert token_bytes(network) == 2 * 2 * config.num_key_value_heads * config.head_dim * 4
    logits = 10 * config.vocab_size * 16
    free = logits + 100 * token_bytes(network) + 5
    assert limit_tokens(network, configured=0, rows=10, free=free) == 100
    assert limit_tokens(network, configured=30, rows=10, free=free) == 30
    assert limit_tokens(network, configured=300, rows=10, free=free) == 100
    assert limit_tokens(network, configured=0, rows=10, free=3) == 0
    assert limit_tokens(network, configured=0, rows=10, free=None) is None
    assert free_bytes(torch.device("cpu")) is None


def test_a_cache_that_cannot_hold_a_group_is_refused_with_the_keys():
    refuse_small_cache(100, prompt_tokens=20, rows=4, new_tokens=20)
    with pytest.raises(ConfigError, match=r"may hold 99 tokens, and a group takes 100: a prompt of 20 and 4 x 20 new"):
        refuse_small_cache(99, prompt_tokens=20, rows=4, new_tokens=20)
    with pytest.raises(ConfigError, match=r"lower sampling.max_new_tokens or batch.group_size"):
        engine(max_cache_tokens=50).generate(PROMPTS, step=0, group_size=3)


def plain_entropies(name, group, token_ids):
    """[T, 2]: entropy and collision of each completion token by a forward of the whole row."""
    with torch.no_grad():
        logits_TV = model(name).eval()(torch.tensor([group.prompt.token_ids + token_ids]), use_cache=False).logits[0]
    probabilities_TV = logits_TV[len(group.prompt.token_ids) - 1 : -1].double().softmax(-1)
    entropy_T = -(probabilities_TV * probabilities_TV.log()).sum(-1)
    return torch.stack([entropy_T, probabilities_TV.square().sum(-1)], dim=-1)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
def test_rows_that_are_sent_back_change_no_token(name, monkeypatch):
    """A tight cache, and groups that start before it is known how long completions become."""
    sent_back, admit = [], SharedDecoder.admit
    monkeypatch.setattr(
        SharedDecoder,
        "admit",
        lambda self, prompts, size, fed=None: (sent_back.extend(fed or ()), admit(self, prompts, size, fed))[1],
    )
    # Stop ids that no model has: every row runs to the end.
    sampling = SamplingConfig(max_new_tokens=48, max_prompt_tokens=LONGEST)
    free = engine(name, stop_ids=(10**6,)).generate(PROMPTS, step=2, group_size=4, sampling=sampling)
    assert not sent_back
    tight = engine(name, stop_ids=(10**6,), max_cache_tokens=LONGEST + 4 * 48, check_steps=2)
    tight.keeps_entropies = True
    found = tight.generate(PROMPTS, step=2, group_size=4, sampling=sampling)
    assert ids(found) == ids(free)
    assert len(sent_back) >= 4 and max(sent_back) > 8
    for group in found:
        for completion in group.completions:
            exact = plain_logprobs(model(name), group.prompt, completion.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs).double(), exact, atol=2e-5, rtol=0)
            kept, expected = torch.tensor(completion.entropies), plain_entropies(name, group, completion.token_ids)
            torch.testing.assert_close(kept.double(), expected, atol=2e-5, rtol=0)


def test_the_cache_stays_below_its_limit(monkeypatch):
    """What is allocated, after every step: prompts to the longest, and the columns of all rows."""
    limit, seen, step = 2 * LONGEST + 5 * 32, [], SharedDecoder.step

    def measured(self, tokens_B):
        logits = step(self, tokens_B)
        layer = self.layers[0]
        seen.append(sum(x.shape[1] * x.shape[2] for x in (layer.prompt_keys, layer.own_keys)))
        return logits

    monkeypatch.setattr(SharedDecoder, "step", measured)
    rollout = engine(max_cache_tokens=limit, check_steps=1)
    expected = ids(engine().generate(PROMPTS, step=4, group_size=2))
    seen.clear()
    assert ids(rollout.generate(PROMPTS, step=4, group_size=2)) == expected
    assert max(seen) <= limit


def test_prefill_goes_in_pieces(monkeypatch):
    pieces, admit = [], SharedDecoder.admit
    monkeypatch.setattr(
        SharedDecoder, "admit", lambda self, prompts, size: (pieces.append(prompts), admit(self, prompts, size))[1]
    )
    expected = ids(engine().generate(PROMPTS, step=4, group_size=2))
    assert [len(piece) for piece in pieces] == [len(PROMPTS)]
    pieces.clear()
    assert ids(engine(prefix_tokens_per_pass=2 * LONGEST).generate(PROMPTS, step=4, group_size=2)) == expected
    assert sum(map(len, pieces)) == len(PROMPTS) and len(pieces) > 1
    assert all(len(piece) * max(len(ids) for ids in piece) <= 2 * LONGEST for piece in pieces)
