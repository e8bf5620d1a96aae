"""The scorer: spans against a naive per-token loop, one pass per sequence, the EMA against its closed form."""

import dataclasses
import itertools
import random

import pytest
import torch
from packed_models import tiny
from tiny_run import config, metrics

from rltrain import cli, trainer
from rltrain.config import ColdStartConfig, ScorerConfig
from rltrain.errors import ConfigError, RunError
from rltrain.policy.load import load_policy
from rltrain.policy.logprobs import LogprobModel, inference
from rltrain.policy.scorer import Scorer, check_same_vocabulary, load_scorer, span_values
from rltrain.policy.tiny import TinyConfig
from rltrain.runs import checkpoint
from rltrain.runtime import dist
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
    found = span_values(LogprobModel(policy.model, temperature=0.3), REQUESTS, token_budget=token_budget)
    for request, spans in zip(REQUESTS, found, strict=True):
        for (start, stop), logprobs in zip(request.spans, spans, strict=True):
            expected = naive(policy.model, request.token_ids, start, stop)
            torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


def test_entropies_are_those_of_a_plain_forward_at_temperature_one(policy):
    scorer = Scorer(LogprobModel(policy.model, temperature=0.3), None, token_budget=40)
    for request, spans in zip(REQUESTS, scorer.entropies(REQUESTS), strict=True):
        with torch.no_grad():
            logprobs_TV = policy.model(torch.tensor([request.token_ids])).logits[0].double().log_softmax(-1)
        entropies_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
        for (start, stop), entropies in zip(request.spans, spans, strict=True):
            torch.testing.assert_close(entropies.double(), entropies_T[start - 1 : stop - 1], rtol=1e-5, atol=1e-5)


def test_two_spans_in_one_pass_equal_two_passes(policy):
    model = LogprobModel(policy.model, temperature=1.0)
    both = span_values(model, REQUESTS, token_budget=100)
    for index, request in enumerate(REQUESTS):
        for span, expected in zip(request.spans, both[index], strict=True):
            alone = span_values(model, [dataclasses.replace(request, spans=(span,))], token_budget=100)
            torch.testing.assert_close(alone[0][0], expected, rtol=1e-5, atol=1e-6)


def test_one_forward_pass_per_sequence(policy):
    """The last token of a sequence predicts nothing, so it is not fed."""
    assert fed_ids(policy, REQUESTS, "padded") == sorted(i for r in REQUESTS for i in r.token_ids[:-1])


def fed_ids(policy, requests, layout):
    seen = []
    model = LogprobModel(policy.model, temperature=1.0)
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].input_ids_L.tolist()))
    span_values(model, requests, token_budget=1000, layouts=(layout,))
    return sorted(token for batch in seen for token in batch)


def prompted(seed=0):
    """Thoughts before a target: three on one prompt, two on another, one without a span, one alone."""
    draw = random.Random(seed)

    def ids(count):
        return tuple(draw.randrange(60) for _ in range(count))

    requests = []
    for prompt, lengths in ((ids(9), (4, 1, 7)), (ids(5), (3, 6)), (ids(3), (2,))):
        for length in lengths:
            whole = prompt + ids(length) + ids(4)
            spans = ((len(whole) - 4, len(whole)), (len(prompt), len(prompt) + 1))
            requests.append(SpanRequest(token_ids=whole, spans=spans, prompt_tokens=len(prompt)))
    return [*requests, SpanRequest(token_ids=ids(8), spans=(), prompt_tokens=3)]


def test_a_shared_prompt_is_fed_once(policy):
    requests = prompted()
    prompts = {one.token_ids[: one.prompt_tokens] for one in requests}
    own = [token for one in requests for token in one.token_ids[one.prompt_tokens : -1]]
    shared = fed_ids(policy, requests, "shared")
    assert shared == sorted([*own, *(token for prompt in prompts for token in prompt)])
    assert len(shared) + 2 * 9 + 5 == len(fed_ids(policy, requests, "packed"))


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma"])
def test_every_layout_scores_as_each_sequence_alone(name):
    """fp64; the smaller budget is below the longest sequence."""
    model = tiny(name).eval()
    for requests, layout, budget in itertools.product(
        (prompted(), list(reversed(prompted(1)))), ("padded", "packed", "shared"), (1000, 12)
    ):
        with inference(wrapped := LogprobModel(model, temperature=0.7)):
            found = span_values(wrapped, requests, token_budget=budget, layouts=(layout,))
            for request, spans in zip(requests, found, strict=True):
                logprobs_TV = model(torch.tensor([request.token_ids])).logits[0].log_softmax(-1)
                for (start, stop), values in zip(request.spans, spans, strict=True):
                    rows, targets = list(range(start - 1, stop - 1)), list(request.token_ids[start:stop])
                    torch.testing.assert_close(values, logprobs_TV[rows, targets], rtol=0, atol=1e-10)


def test_the_layouts_of_a_scorer_are_those_that_its_models_can_do(policy, tmp_path, caplog):
    """Phi counts positions by itself, which the check finds, so that no prompt is shared."""
    module = LogprobModel(policy.model, temperature=1.0)
    reference = LogprobModel(load_policy(SMALL).model, temperature=1.0)
    reference.model.model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: (args[:1], {"position_ids": torch.arange(args[0].shape[1])[None]}), with_kwargs=True
    )
    run_config = cli.compose(["+experiment=rlp", "scorer.kind=frozen", "batch.packing=shared", f"run_dir={tmp_path}"])
    seen = []
    module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].prefix_S))
    results = {}
    for name, phi in (("good", module), ("counting", reference)):
        scorer = load_scorer(run_config, policy, module, reference=phi)
        seen.clear()
        results[name] = scorer.policy(prompted())
        assert all((prefix_S is None) == (name == "counting") for prefix_S in seen)
    assert "layout shared the log-probs" in caplog.text
    torch.testing.assert_close(results["good"], results["counting"], rtol=1e-4, atol=1e-5)


def test_scores_carry_no_gradient_and_leave_training_mode(policy):
    model = LogprobModel(policy.model, temperature=1.0).train()
    scorer = Scorer(model, model, token_budget=100)
    assert not scorer.policy(REQUESTS)[0][0].requires_grad
    assert all(module.training for module in model.modules())


def test_nothing_to_score_is_no_result(policy):
    model = LogprobModel(policy.model, temperature=1.0)
    assert span_values(model, [], token_budget=10) == []


def test_a_span_outside_its_sequence_is_refused():
    with pytest.raises(ValueError, match="do not lie in 1..3"):
        SpanRequest(token_ids=(1, 2, 3), spans=((0, 2),))
    with pytest.raises(ValueError, match="do not lie in 2..3"):
        SpanRequest(token_ids=(1, 2, 3), spans=((1, 3),), prompt_tokens=2)
    with pytest.raises(ValueError, match="a prompt of 3 tokens in a sequence of 3"):
        SpanRequest(token_ids=(1, 2, 3), spans=(), prompt_tokens=3)


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
    other.model.resize_token_embeddings(len(other.tokenizer))
    run_config = frozen_run(saved(policy, tmp_path / "policy"), saved(other, tmp_path / "other"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"other: its vocabulary .*; choose a model that shares") as error:
        trainer.fit(run_config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_scorer_with_fewer_embeddings_than_tokens_is_refused(policy):
    other = load_policy(SMALL)
    other.model.resize_token_embeddings(90)
    with pytest.raises(ConfigError, match=r"scorer.path=there: its vocabulary .*; choose a model that shares"):
        check_same_vocabulary(policy, other, name="scorer.path=there")


@pytest.mark.parametrize(("values", "message"), [
    ({"kind": "teacher"}, "set one of policy, frozen, ema"),
    ({"decay": 1.0}, r"scorer.decay=1.0: must lie in \[0, 1\)"),
    ({"kind": "ema", "path": "x"}, "set scorer.kind=frozen or leave the path out"),
    ({"path": "x", "cold_start": ColdStartConfig(steps=1)}, "has no effect; set scorer.kind=frozen and no path, or"),
])  # fmt: skip
def test_impossible_scorers_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ScorerConfig(**values)


def test_no_scorer_is_built_unless_a_reward_needs_one(tmp_path):
    dist.setup(deadline_s=60)
    run = trainer.build(config(tmp_path / "run", "steps=1"))
    assert run.scorer is None
    with pytest.raises(RunError, match="needs={Need.SCORER}"):
        run.context(0).scorer.policy([])


def test_the_checkpoint_holds_no_tensors_without_an_ema(tmp_path):
    trainer.fit(config(tmp_path / "run", "steps=1"))
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run")
    assert checkpoint.load_tensors(saved) == {}
    assert "scorer/ema_distance" not in metrics(tmp_path / "run")[1]


def test_a_sequence_of_more_tokens_than_positions_is_named(policy):
    model = LogprobModel(policy.model, temperature=1.0)
    request = SpanRequest(token_ids=(5,) * 513, spans=((1, 2),))
    with pytest.raises(RunError, match="a sequence of 513 tokens is to be scored by a model of 512 positions; shorten"):
        Scorer(model, model, token_budget=1000).phi([request])


def test_the_reference_is_scored_where_it_was_asked_for(policy):
    model, other = LogprobModel(policy.model, temperature=0.3), load_policy(dataclasses.replace(SMALL, init_seed=1))
    reference = LogprobModel(other.model, temperature=0.3)
    found = Scorer(model, model, token_budget=100, reference=reference).reference(REQUESTS)
    torch.testing.assert_close(found[0][1], naive(other.model, REQUESTS[0].token_ids, 4, 6), rtol=1e-5, atol=1e-5)
    with pytest.raises(RunError, match="needs={Need.SCORER, Need.REFERENCE_LOGPROBS}"):
        Scorer(model, model, token_budget=100).reference(REQUESTS)
