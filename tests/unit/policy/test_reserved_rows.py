"""Reserved rows: which they are, that no softmax sees them, and what the head's loss changes."""

import dataclasses

import pytest
import torch
from collated import group, spread

from rltrain.batching.collate import collate
from rltrain.errors import ConfigError
from rltrain.losses.surrogate import SurrogateConfig
from rltrain.policy import logprobs as head
from rltrain.policy.load import load_policy, save_policy
from rltrain.policy.logprobs import HeadTraining, LogprobModel, micro_batch_loss
from rltrain.policy.reserved_rows import reserve_rows, reserved_rows
from rltrain.policy.tiny import TinyConfig
from rltrain.runtime.introspection import IntrospectionConfig

GRID = IntrospectionConfig(head=True, lengths=[0, 4, 8])
SMALL = TinyConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64)
LOSS = SurrogateConfig()
TOKENS = 101  # of the tiny model's tokenizer


def with_head(**options):
    return dataclasses.replace(SMALL, introspection=dataclasses.replace(GRID, **options))


def batches(layout):
    groups = [group((5, 9, 3), [1.0, 0.0, 1.0]), group((4, 2, 6), [0.0, 0.0, 0.0], prompt=(3, 4, 5), name="q")]
    options = {"aggregation": "token", "token_budget": 64, "max_new_tokens": 9, "layouts": (layout,)}
    return collate(groups, spread(groups, 0.5), **options)


def trained(model, layout="padded", **options):
    """The losses' sum and the gradients by name."""
    model.zero_grad()
    made, denominators = batches(layout)
    training = HeadTraining(config=dataclasses.replace(GRID, **options), tokens=denominators.tokens)
    total, wrapped = 0.0, LogprobModel(model, temperature=1.0)
    for one in made:
        output = micro_batch_loss(wrapped, one, LOSS, training if training.config.weight else None)
        output.loss.backward()
        total += output.loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_rows_are_appended_masked_and_kept_by_files(tmp_path):
    plain, policy = load_policy(SMALL), load_policy(with_head())
    tokens = len(plain.tokenizer)
    assert reserved_rows(policy.model) == slice(tokens, tokens + 6)
    assert reserved_rows(plain.model) is None
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[tokens:] = 100.0  # would be sampled before any token
    ids = torch.tensor([[5, 6, 7]])
    probabilities = policy.model(ids).logits.softmax(-1)
    assert probabilities[..., tokens:].eq(0).all()
    torch.testing.assert_close(probabilities[..., :tokens], plain.model(ids).logits.softmax(-1))
    save_policy(policy, tmp_path)
    again = load_policy(dataclasses.replace(with_head(), path=str(tmp_path)))
    assert reserved_rows(again.model) == slice(tokens, tokens + 6)
    assert again.model.get_output_embeddings().weight[tokens:].eq(100.0).all()
    assert again.model.generation_config.suppress_tokens == list(range(tokens, tokens + 6))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": False}, "saved with 6 reserved rows from 101, which would be sampled as tokens; set .*head=true"),
        ({"lengths": [0, 4]}, "saved with 6 reserved rows from 101, and the grid takes 4 from 101; set .*lengths"),
    ],
    ids=["no head", "other cells"],
)
def test_a_saved_head_is_loaded_as_it_was_trained(tmp_path, options, words):
    save_policy(load_policy(with_head()), tmp_path)
    with pytest.raises(ConfigError, match=words):
        load_policy(dataclasses.replace(with_head(**options), path=str(tmp_path)))


def test_a_model_that_caps_its_logits_is_refused():
    """Its cap makes a finite number of the mask."""
    policy = load_policy(SMALL)
    policy.model.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="caps its logits"):
        reserve_rows(policy.model, policy.tokenizer, GRID)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first_row": 98}, r"the tokenizer uses 3 of the rows 98\.\.103, the first is 98; leave .* above 100"),
        ({"append_rows": False}, "takes 6 rows from 101, and the model has 101; use fewer bins"),
        ({"first_row": 200}, "takes 6 rows from 200, and the model has 101"),
    ],
    ids=["used", "too few", "beyond"],
)
def test_rows_that_cannot_be_reserved(options, words):
    with pytest.raises(ConfigError, match=words):
        load_policy(with_head(**options))


def test_the_layouts_agree():
    model = load_policy(with_head()).model
    torch.nn.init.normal_(model.get_output_embeddings().weight[TOKENS:], std=0.1)
    (loss, gradients), *others = (trained(model, layout) for layout in ("padded", "packed", "shared"))
    for other, theirs in others:
        assert other == pytest.approx(loss, abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[name], gradient, atol=1e-5, rtol=1e-3)


def test_the_fused_head_gives_the_same(monkeypatch):
    model = load_policy(with_head()).model
    loss, gradients = trained(model)
    monkeypatch.setattr(head, "prefers_fused", lambda *arguments: True)
    fused, theirs = trained(model)
    assert fused == pytest.approx(loss, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, atol=1e-5, rtol=1e-3)


def test_without_trunk_the_policy_gets_its_own_gradient_alone():
    """The reserved rows, which the policy's loss does not see, get the head's gradient; all else the policy's."""
    model = load_policy(with_head()).model
    torch.nn.init.normal_(model.get_output_embeddings().weight[TOKENS:], std=0.1)  # zeros give the trunk no gradient
    _, policy = trained(model, weight=0.0)
    _, both = trained(model, trunk=False)
    _, whole = trained(model, trunk=True)
    embedding = "model.embed_tokens.weight"
    assert policy[embedding][TOKENS:].eq(0).all()
    assert both[embedding][TOKENS:].abs().sum() > 0
    both[embedding][TOKENS:] = 0
    for name, gradient in policy.items():
        assert torch.equal(both[name], gradient), name
    assert not torch.equal(whole["model.norm.weight"], policy["model.norm.weight"])


def test_the_head_learns_of_completions_that_teach_the_policy_nothing():
    """The zero-variance group's tokens are among the observations, with their remaining lengths and rewards."""
    (one,), _ = batches("padded")
    assert sorted(one.remaining_N.tolist()) == sorted(
        [n for length in (5, 9, 3, 4, 2, 6) for n in range(1, length + 1)]
    )
    assert one.rewards_N.sum() == 5 + 3
