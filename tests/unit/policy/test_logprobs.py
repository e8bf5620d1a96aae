"""The head sees the rows that carry loss and no other, and gives the same gradient whichever way it takes."""

import dataclasses

import pytest
import torch
from packed_models import SIZES, assert_close, batches_of
from probe_models import TOKENIZER, policy_of, request, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from rltrain import kernels
from rltrain.loss import policy_loss
from rltrain.losses.surrogate import SurrogateConfig
from rltrain.policy.logprobs import LogprobModel, inference, logprobs, loss_tokens, micro_batch_loss
from rltrain.policy.scorer import span_values
from rltrain.rollout import probes
from rltrain.rollout.probe_types import ProbeSettings
from rltrain.types import SpanRequest

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")


class HeadRows(TorchDispatchMode):
    """Counts the rows of all products whose result is as wide as the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in PRODUCTS and out.shape[-1] == self.vocabulary:
            self.rows += out.numel() // self.vocabulary
        return out


def model_of(vocabulary, dtype=torch.float64):
    torch.manual_seed(0)
    config = Qwen3Config(**(SIZES | {"vocab_size": vocabulary}), tie_word_embeddings=True)
    return LogprobModel(Qwen3ForCausalLM(config).to(dtype).eval(), temperature=0.7)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_in_training_and_under_a_reference(layout):
    """40 loss tokens; 50 to 117 tokens are fed."""
    model = model_of(61)
    (batch,) = batches_of(layout)
    assert len(batch.targets_N) == 40
    assert len(batch.input_ids_L) >= 50
    with HeadRows(61) as head:
        micro_batch_loss(model, batch, SurrogateConfig()).loss.backward()
    assert head.rows == 40
    with HeadRows(61) as head, torch.no_grad():
        model(batch, entropy=False)
    assert head.rows == 40


def test_in_scoring():
    """Three tokens of two spans, and one of another sequence."""
    model = model_of(61)
    requests = [
        SpanRequest(token_ids=tuple(range(20)), spans=((3, 5), (10, 11))),
        SpanRequest(token_ids=tuple(range(7)), spans=((6, 7),)),
    ]
    with HeadRows(61) as head, inference(model):
        span_values(model, requests, token_budget=64)
    assert head.rows == 4


def test_in_probes():
    """Two cuts with three answer tokens each, and one row that the filling of the cache asks for."""
    model = tiny_model()
    one = request("a", "12+7=", "12+7=19\n19-2=17\n = 17", (8, 16), "17}")
    suffix = tuple(TOKENIZER("\\boxed{")["input_ids"])
    settings = ProbeSettings(seed=7, step=2, suffix_ids=suffix, continuations=1, max_tokens=1)
    with HeadRows(model.config.vocab_size) as head:
        probes.probe(policy_of(model), [one], settings)
    assert head.rows == 1 + 2 * 3


@pytest.mark.parametrize("config", [
    SurrogateConfig(),
    SurrogateConfig(surrogate="cispo", kl_coef=0.1, entropy_coef=0.2),
    SurrogateConfig(importance_correction="mask"),
], ids=["clip", "kl and entropy", "importance"])  # fmt: skip
def test_the_gradient_that_is_made_in_the_forward(config):
    """40 rows of 30,000 logits are too many to keep, so the head is given the loss; GSPO's it is not."""
    model = model_of(30_000)
    batches = [with_reference(batch) for batch in batches_of("shared", budget=40)]
    results = []
    for one_pass in (True, False):
        model.zero_grad()
        for batch in batches:
            if one_pass:
                output = micro_batch_loss(model, batch, config)
            else:
                head = logprobs(model, batch)
                output = policy_loss(head.logprobs_N, batch, config, entropy_N=head.entropy_N)
            (2 * output.loss).backward()
            assert output.metrics.keys() >= {"loss", "entropy/trained", "kl", "clip_ratio/low_mean"}
            results.append((float(output.loss.detach()), output.metrics, output.logprobs_N))
        results.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    (*made, gradients), (*expected, expected_gradients) = results[: len(results) // 2], results[len(results) // 2 :]
    assert len(made) > 1
    assert_close(gradients, expected_gradients, 1e-12)
    for (loss, metrics, logprobs_N), (loss_two, metrics_two, logprobs_two_N) in zip(made, expected, strict=True):
        assert loss == pytest.approx(loss_two, abs=1e-12)
        torch.testing.assert_close(logprobs_N, logprobs_two_N, rtol=0, atol=1e-12)
        for name, value in metrics.items():
            assert vars(value) == pytest.approx(vars(metrics_two[name]), abs=1e-9), name


def with_reference(batch):
    return dataclasses.replace(batch, reference_logprobs_N=batch.old_logprobs_N.double() - 3)


def test_many_logits_on_a_cpu_go_the_way_that_needs_three_products():
    model, (batch,) = model_of(30_000, torch.float32), batches_of("shared")
    sizes = (30_000, torch.device("cpu"))
    assert kernels.prefers_fused(len(batch.targets_N), *sizes)
    assert not kernels.prefers_fused(5, *sizes)
    for ratio, rows in (("token", 4 * 40 * (30_000 // 4096)), ("sequence", 0)):
        with HeadRows(1024) as head:  # the fused path's blocks are four pieces so wide, the other's twice as wide
            micro_batch_loss(model, batch, SurrogateConfig(ratio=ratio)).loss.backward()
        assert head.rows == rows


def test_loss_tokens_of_some_rows():
    (batch,) = batches_of("shared")
    some = loss_tokens(batch, slice(3, 9))
    assert torch.equal(some.targets_N, batch.targets_N[3:9])
    assert torch.equal(some.advantages_N, batch.advantages_N[3:9])
    assert some.boundaries_S1 is batch.boundaries_S1
