"""The scorer: spans against a naive per-token loop, one pass per sequence, the EMA against its closed form."""

import dataclasses

import pytest
import torch
from tiny_run import config, metrics

from rltrain import checkpoint, cli, dist, trainer
from rltrain.config import ConfigError, ScorerConfig
from rltrain.logprobs import LogprobModel
from rltrain.model import TinyConfig, load_policy
from rltrain.scorer import Scorer, check_same_vocabulary, load_scorer, span_logprobs
from rltrain.types import SpanRequest

SMALL = TinyConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64)


@pytest.fixture(scope="module")
def policy():
    return load_policy(SMALL)


def naive(model, ids, start, stop) -> torch.Tensor:
    """One forward per token: the distribution after ids[:t], asked for ids[t]."""
    with torch.no_grad():
        rows = [model(torch.tensor([ids[:t]])).logits[0, -1].log_softmax(-1)[ids[t]] for t in range(start, stop)]
    return torch.stack(rows) if rows else torch.zeros(0)


REQUESTS = [
    SpanRequest(token_ids=(5, 9, 12, 40, 41, 7), spans=((1, 3), (4, 6))),
    SpanRequest(token_ids=(8, 30), spans=((1, 2),)),
    SpanRequest(token_ids=tuple(range(6, 30)), spans=((20, 24), (3, 3), (1, 2))),
]


@pytest.mark.parametrize("token_budget", [1, 30, 1000])
def test_spans_equal_a_naive_loop_whatever_the_batches(policy, token_budget):
    found = span_logprobs(LogprobModel(policy.model, temperature=0.3), REQUESTS, token_budget=token_budget)
    for request, spans in zip(REQUESTS, found, strict=True):
        for (start, stop), logprobs in zip(request.spans, spans, strict=True):
            expected = naive(policy.model, request.token_ids, start, stop)
            torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


def test_two_spans_in_one_pass_equal_two_passes(policy):
    model = LogprobModel(policy.model, temperature=1.0)
    both = span_logprobs(model, REQUESTS, token_budget=100)
    for index, request in enumerate(REQUESTS):
        for span, expected in zip(request.spans, both[index], strict=True):
            alone = span_logprobs(model, [dataclasses.replace(request, spans=(span,))], token_budget=100)
            torch.testing.assert_close(alone[0][0], expected, rtol=1e-5, atol=1e-6)


def test_one_forward_pass_per_sequence(policy):
    seen = []
    model = LogprobModel(policy.model, temperature=1.0)
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].input_ids_L.tolist()))
    span_logprobs(model, REQUESTS, token_budget=1000)
    assert sorted(token for batch in seen for token in batch) == sorted(i for r in REQUESTS for i in r.token_ids)


def test_scores_carry_no_gradient_and_leave_training_mode(policy):
    model = LogprobModel(policy.model, temperature=1.0).train()
    scorer = Scorer(model, model, token_budget=100)
    assert not scorer.policy(REQUESTS)[0][0].requires_grad
    assert all(module.training for module in model.modules())


def test_nothing_to_score_is_no_result(policy):
    model = LogprobModel(policy.model, temperature=1.0)
    assert span_logprobs(model, [], token_budget=10) == []


def test_a_span_outside_its_sequence_is_refused():
    with pytest.raises(ValueError, match="do not lie in 1..3"):
        SpanRequest(token_ids=(1, 2, 3), spans=((0, 2),))


def test_the_ema_is_its_closed_form_after_n_steps():
    """phi_n = d^n·theta_0 + (1 - d)·sum_k d^(n-k)·theta_k, in fp32 even where theta is bf16 and hardly moves."""
    decay, steps = 0.9, 12
    theta = LogprobModel(load_policy(dataclasses.replace(SMALL, dtype="bfloat16")).model, temperature=1.0)
    phi = LogprobModel(load_policy(SMALL).model, temperature=1.0)
    scorer = Scorer(theta, phi, token_budget=10, decay=decay)
    scorer.start(theta.named_parameters())
    expected = {name: value.detach().double().clone() for name, value in theta.named_parameters()}
    for _ in range(steps):
        with torch.no_grad():
            for parameter in theta.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        scorer.follow(theta.named_parameters())
        expected = {n: decay * expected[n] + (1 - decay) * v.detach().double() for n, v in theta.named_parameters()}
    for name, value in scorer.tensors().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_ema_distance_is_relative_to_the_policy():
    theta = LogprobModel(load_policy(SMALL).model, temperature=1.0)
    scorer = Scorer(theta, LogprobModel(load_policy(SMALL).model, temperature=1.0), token_budget=10, decay=0.5)
    scorer.start(theta.named_parameters())
    with torch.no_grad():
        for parameter in theta.parameters():
            parameter.mul_(2)
    (distance,) = scorer.follow(theta.named_parameters()).values()
    assert distance.total == pytest.approx(0.25)  # phi = 1.5, theta = 2, in units of the start


def test_the_policy_is_its_own_phi_when_asked(policy, tmp_path):
    run_config = config(tmp_path, "scorer.kind=policy")
    scorer = load_scorer(run_config, policy, LogprobModel(policy.model, temperature=1.0))
    assert torch.equal(scorer.policy(REQUESTS)[0][0], scorer.phi(REQUESTS)[0][0])


def saved(policy, folder):
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def frozen_run(policy_folder, scorer_folder, run_dir):
    overrides = ["+experiment=rlp", "cold_start.steps=0", "model=pretrained", f"model.path={policy_folder}"]
    return cli.compose([*overrides, "scorer.kind=frozen", f"scorer.path={scorer_folder}", f"run_dir={run_dir}"])


def test_a_frozen_scorer_is_the_model_at_its_path(policy, tmp_path):
    other = load_policy(dataclasses.replace(SMALL, init_seed=1))
    run_config = frozen_run(saved(policy, tmp_path / "policy"), saved(other, tmp_path / "other"), tmp_path / "run")
    scorer = load_scorer(run_config, policy, LogprobModel(policy.model, temperature=1.0))
    for model, found in ((policy.model, scorer.policy(REQUESTS)), (other.model, scorer.phi(REQUESTS))):
        expected = naive(model, REQUESTS[0].token_ids, 4, 6)
        torch.testing.assert_close(found[0][1], expected, rtol=1e-5, atol=1e-5)


def test_a_run_with_a_scorer_of_another_vocabulary_ends_before_its_first_step(policy, tmp_path):
    other = load_policy(SMALL)
    other.tokenizer.add_tokens(["<step>"])
    run_config = frozen_run(saved(policy, tmp_path / "policy"), saved(other, tmp_path / "other"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"other: its vocabulary .*; choose a model that shares") as error:
        trainer.fit(run_config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_scorer_with_fewer_embeddings_than_tokens_is_refused(policy):
    other = load_policy(SMALL)
    other.model.resize_token_embeddings(90)
    with pytest.raises(ConfigError, match=r"scorer.path=there: its vocabulary .*; choose a model that shares"):
        check_same_vocabulary(policy, other, path="there")


@pytest.mark.parametrize(("values", "message"), [
    ({"kind": "teacher"}, "set one of policy, frozen, ema"),
    ({"decay": 1.0}, r"scorer.decay=1.0: must lie in \[0, 1\)"),
    ({"kind": "ema", "path": "x"}, "set scorer.kind=frozen or leave the path out"),
])  # fmt: skip
def test_impossible_scorers_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ScorerConfig(**values)


def test_no_scorer_is_built_unless_a_reward_needs_one(tmp_path):
    dist.setup(deadline_s=60)
    run = trainer.build(config(tmp_path / "run", "steps=1"))
    assert run.scorer is None
    assert run.context(0).scorer is None


def test_the_checkpoint_holds_no_tensors_without_an_ema(tmp_path):
    trainer.fit(config(tmp_path / "run", "steps=1"))
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run")
    assert checkpoint.load_tensors(saved) == {}
    assert "scorer/ema_distance" not in metrics(tmp_path / "run")[1]
