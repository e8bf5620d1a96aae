"""The entropy-preserving objective of a cold start, against slow references and plain fine-tuning."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.optimize import brentq
from trl import SFTTrainer

from rltrain import cli, sft
from rltrain.errors import ConfigError
from rltrain.policy import curio
from rltrain.policy.load import load_policy


def entropy(logits, temperature=1.0):
    top = sorted(logits, reverse=True)[: curio.CANDIDATES]
    weights = [math.exp((each - top[0]) / temperature) for each in top]
    total = sum(weights)
    return -sum(w / total * math.log(w / total) for w in weights if w)


def reference_temperature(logits):
    """The same, by a root finder."""
    before = entropy(logits)
    if before <= 0.03:
        return 1.1

    def missing(temperature):
        return entropy(logits, temperature) - before - 0.5 / (1 + math.exp(-2 * (before - 1.2)))

    if missing(1.1) >= 0:
        return 1.1
    return 1.5 if missing(1.5) <= 0 else brentq(missing, 1.1, 1.5, xtol=1e-9)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0, 4.0, 30.0])
def test_the_temperature_raises_the_entropy_by_the_asked_amount(scale):
    logits_NV = scale * torch.randn(40, 700, generator=torch.Generator().manual_seed(0))
    expected = [reference_temperature(row) for row in logits_NV.tolist()]
    torch.testing.assert_close(curio.temperatures(logits_NV), torch.tensor(expected), rtol=0, atol=2e-4)


def test_the_temperature_lies_inside_its_bounds_for_some_rows_and_at_them_for_others():
    logits_NV = torch.tensor([[0.0] * 4, [20.0, 0.0, 0.0, 0.0], [2.2, 0.6, 0.0, -1.0]])
    # Uniform: no temperature raises the entropy, so the highest. Certain: the lowest.
    tau_N = curio.temperatures(logits_NV).tolist()
    assert tau_N[:2] == pytest.approx([1.5, 1.1], abs=1e-5)
    assert tau_N[2] == pytest.approx(reference_temperature(logits_NV[2].tolist()), abs=1e-5)
    assert 1.11 < tau_N[2] < 1.49


def test_the_loss_of_a_token_and_its_gradient():
    logits_NV = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25)]], requires_grad=True)
    start_NV = torch.tensor([[20.0, 0.0, 0.0]], requires_grad=True)  # certain: tau = 1.1
    losses_N = curio.token_losses(logits_NV, start_NV, torch.tensor([1]), alpha=2.0)
    wanted = -20 / 1.1 - math.log1p(2 * math.exp(-20 / 1.1))
    distance = math.log(0.25) - wanted
    assert losses_N.tolist() == pytest.approx([math.log(4) + distance**2], rel=1e-6)
    losses_N.sum().backward()
    slope = -1 + 2 * distance  # of the loss in log pi(y); that of log pi(y) in the logits is onehot - pi
    assert logits_NV.grad[0].tolist() == pytest.approx([-0.5 * slope, 0.75 * slope, -0.25 * slope], rel=1e-5)
    assert start_NV.grad is None


TINY = ["model.hidden_size=32", "model.layers=1", "model.heads=2", "model.intermediate_size=64", "data=small_integers"]
SHORT = ["cold_start.steps=3", "cold_start.batch_size=4", "cold_start.problems=12", "cold_start.warmup_steps=0"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A trained folder, and a function that fine-tunes it further and gives the weights."""
    root = tmp_path_factory.mktemp("curio")
    sft.train(cli.compose([*TINY, *SHORT, f"run_dir={root}"]), root / "start")
    options = ["data=small_integers", "model=pretrained", f"model.path={root / 'start'}", "model.chat=false", *SHORT]

    def tuned(name, *more):
        config = cli.compose([*options, *more, f"run_dir={root / name}"])
        sft.train(config, root / name)
        return load_policy(config.model).model, load_policy(cli.compose([*options, f"model.path={root / name}"]).model)

    return tuned


def test_without_its_second_term_it_is_plain_fine_tuning(start):
    plain = start("plain")[1].model.state_dict()
    curious = start("curious", "cold_start.objective=curio", "cold_start.curio_alpha=0")[1].model.state_dict()
    with_alpha = start("alpha", "cold_start.objective=curio")[1].model.state_dict()
    for name, weights in plain.items():
        torch.testing.assert_close(curious[name], weights, rtol=0, atol=2e-6)
    assert any(not torch.allclose(with_alpha[name], weights, atol=1e-4) for name, weights in plain.items())


def test_a_model_with_adapters_is_its_own_start_with_them_off(tmp_path):
    policy = load_policy(cli.compose([*TINY, f"run_dir={tmp_path}"]).model)
    before = copy.deepcopy(policy.model)
    model = get_peft_model(policy.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    with curio._starting(model.train(), None) as frozen, torch.no_grad():
        seen = frozen(ids_BT).logits
    assert model.training and not torch.equal(model(ids_BT).logits, seen)
    torch.testing.assert_close(seen, before(ids_BT).logits)
    assert issubclass(curio.trainer_class(SFTTrainer, model, alpha=1.0), SFTTrainer)


def test_what_has_no_meaning_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cold_start.curio_alpha=0.5: has no effect with .*objective=likelihood"):
        cli.compose(["cold_start.curio_alpha=0.5"])
    with pytest.raises(ConfigError, match="cold_start.objective=other"):
        cli.compose(["cold_start.objective=other"])
    config = cli.compose([*TINY, *SHORT, "cold_start.objective=curio", f"run_dir={tmp_path}"])
    with pytest.raises(ConfigError, match="cold_start.objective=curio with model=tiny: .* random weights"):
        sft.train(config, tmp_path / "cold_start")
