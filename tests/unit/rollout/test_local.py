"""The local rollout engine against plain forwards, and the determinism contract."""

import copy

import pytest
import torch
from local_engine import END, EOS, PAD, PROMPTS, VOCABULARY, Policy, engine, ids, model, plain_logprobs, tokenizer

from rltrain.config import SamplingConfig
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig
from rltrain.rollout.shared_prompt_decoder import SharedDecoder


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2", "gpt2", "bloom", "mamba", "gpt_oss"])
def test_logprobs_are_those_of_a_plain_forward(name):
    sampling = SamplingConfig(max_new_tokens=24, temperature=0.8)
    groups = engine(name).generate(PROMPTS, step=3, group_size=3, sampling=sampling)
    lengths = set()
    for group in groups:
        for completion in group.completions:
            expected = plain_logprobs(model(name), group.prompt, completion.token_ids, 0.8)
            torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, atol=1e-5, rtol=0)
            lengths.add(len(completion.token_ids))
    assert len(lengths) > 2 and model(name).training


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "bloom"])
def test_batching_changes_no_token(name):
    whole = engine(name, compact_share=1.0, check_steps=24).generate(PROMPTS, step=5, group_size=4)
    expected = ids(whole)
    assert ids(engine(name).generate(PROMPTS, step=5, group_size=4)) == expected
    assert ids(engine(name).generate(PROMPTS[::-1], step=5, group_size=4)) == expected
    assert (
        ids(engine(name, max_rows=8, check_steps=1, compact_share=0.01).generate(PROMPTS, step=5, group_size=4))
        == expected
    )
    assert ids(engine(name, max_rows=1).generate(PROMPTS, step=5, group_size=4)) == expected
    split = [g for p in PROMPTS for g in engine(name).generate([p], step=5, group_size=4)]
    assert ids(split) == expected
    smaller = ids(engine(name).generate(PROMPTS, step=5, group_size=2))
    assert smaller == {problem: rows[:2] for problem, rows in expected.items()}
    assert ids(engine(name).generate(PROMPTS, step=6, group_size=4)) != expected
    assert {completion.finish for group in whole for completion in group.completions} == {"stop", "length"}


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2", "gpt2"])
def test_logprobs_with_refill_are_those_of_a_plain_forward(name):
    groups = engine(name, max_rows=7, check_steps=1, compact_share=0.01).generate(PROMPTS * 3, step=1, group_size=2)
    for group in groups:
        for completion in group.completions:
            expected = plain_logprobs(model(name), group.prompt, completion.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, atol=1e-5, rtol=0)


def test_greedy_is_that_of_transformers():
    sampling = SamplingConfig(max_new_tokens=20, temperature=0.0)
    for group in engine().generate(PROMPTS, step=0, group_size=1, sampling=sampling):
        network = model("qwen3").eval()
        expected = network.generate(torch.tensor([group.prompt.token_ids]), max_new_tokens=20, do_sample=False)
        network.train()
        assert group.completion_ids[0] == tuple(expected[0, len(group.prompt.token_ids) :].tolist())
        assert set(group.completions[0].logprobs) == {0.0}


def test_first_tokens_follow_the_softmax():
    groups = engine().generate(PROMPTS[:1], step=0, group_size=2000, sampling=SamplingConfig(max_new_tokens=1))
    tokens = torch.tensor([ids[0] for ids in groups[0].completion_ids])
    vocabulary = torch.arange(VOCABULARY["vocab_size"])
    probabilities = torch.stack(
        [plain_logprobs(model("qwen3"), PROMPTS[0], (int(token),), 1.0)[0] for token in vocabulary]
    ).exp()
    expected = 2000 * probabilities
    counts = torch.bincount(tokens, minlength=len(vocabulary)).double()
    common = expected >= 5
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert common.sum() > 10 and chi_square < torch.distributions.Chi2(float(common.sum())).mean * 2


def test_every_stop_id_ends_a_completion_and_is_kept():
    stop_ids = (EOS, END, 5)
    groups = engine(stop_ids=stop_ids).generate(PROMPTS, step=0, group_size=8)
    completions = [completion for group in groups for completion in group.completions]
    assert {c.token_ids[-1] for c in completions if c.finish == "stop"} == set(stop_ids)
    for completion in completions:
        assert not set(completion.token_ids[:-1]) & set(stop_ids)
        if completion.finish == "length":
            assert len(completion.token_ids) == 24 and completion.token_ids[-1] not in stop_ids
        else:
            assert completion.text == tokenizer().decode(completion.token_ids[:-1])


@pytest.mark.parametrize("check_steps", [1, 4, 24])
def test_a_stop_string_ends_the_completion_at_the_token_that_completes_it(check_steps):
    free = ids(engine().generate(PROMPTS, step=0, group_size=8))
    stop = [tokenizer().decode(max(rows, key=len)[4:6]) for rows in free.values()]
    sampling = SamplingConfig(max_new_tokens=24, stop=stop)
    groups = engine(check_steps=check_steps).generate(PROMPTS, step=0, group_size=8, sampling=sampling)
    stopped_early = 0
    for group in groups:
        for completion, uncut in zip(group.completions, free[group.prompt.problem.id], strict=True):
            texts = [tokenizer().decode(uncut[: n + 1]) for n in range(len(uncut))]
            found = [n + 1 for n, text in enumerate(texts) if any(each in text for each in stop)]
            assert completion.token_ids == uncut[: min(found, default=len(uncut))]
            assert completion.finish == ("stop" if found or uncut[-1] == EOS else "length")
            stopped_early += bool(found)
    assert stopped_early >= len(PROMPTS)


def test_modes_are_restored_and_checkpointing_keeps_the_cache():
    network = model("llama")
    expected = ids(engine("llama").generate(PROMPTS, step=2, group_size=2))
    network.activation_checkpointing_enable()
    network.lm_head.eval()
    assert ids(engine("llama").generate(PROMPTS, step=2, group_size=2)) == expected
    assert network.training and network.model.layers[0].training and not network.lm_head.training
    assert network.config._attn_implementation == "sdpa" and torch.is_grad_enabled()
    network.activation_checkpointing_disable()
    network.train()


def test_lora_takes_part():
    import peft

    base = copy.deepcopy(model("qwen3"))
    targets = ["q_proj", "v_proj", "down_proj"]
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.5))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.train()
    rollout = LocalRollout(
        LocalRolloutConfig(), SamplingConfig(max_new_tokens=12), Policy(adapted, tokenizer()), seed=7
    )
    groups = rollout.generate(PROMPTS, step=5, group_size=2)
    for group in groups:
        for completion in group.completions:
            expected = plain_logprobs(adapted, group.prompt, completion.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, atol=1e-5, rtol=0)


def test_bfloat16_decoding_follows_the_policy_after_sync():
    policy = Policy(copy.deepcopy(model("qwen3")), tokenizer())
    rollout = LocalRollout(LocalRolloutConfig(dtype="bfloat16"), SamplingConfig(max_new_tokens=8), policy, seed=1)
    cast = copy.deepcopy(policy.model).to(torch.bfloat16)
    expected = LocalRollout(LocalRolloutConfig(), SamplingConfig(max_new_tokens=8), Policy(cast, tokenizer()), seed=1)
    before = ids(rollout.generate(PROMPTS, step=0, group_size=4))
    assert before == ids(expected.generate(PROMPTS, step=0, group_size=4))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    rollout.sync(policy)
    after = ids(rollout.generate(PROMPTS, step=0, group_size=4))
    cast.load_state_dict(policy.model.state_dict())
    assert after == ids(expected.generate(PROMPTS, step=0, group_size=4)) != before
    assert policy.model.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "same"), [(torch.float32, True), (torch.bfloat16, False)])
def test_in_bfloat16_the_trainer_computes_its_own_log_probs(dtype, same):
    policy = Policy(copy.deepcopy(model("qwen3")).to(dtype), tokenizer())
    assert LocalRollout(LocalRolloutConfig(), SamplingConfig(), policy, seed=1).same_distribution is same


def test_a_cache_limit_changes_no_token():
    expected = ids(engine().generate(PROMPTS, step=0, group_size=3))
    assert ids(engine(max_cache_tokens=100).generate(PROMPTS, step=0, group_size=3)) == expected


def test_llama_step_is_the_model_itself():
    """The lean step against transformers' own forward, logits for logits, in float64."""
    for name in ("llama", "qwen3"):
        network = copy.deepcopy(model(name)).double().eval()
        with torch.no_grad():
            decoders = [SharedDecoder(network, pad_id=PAD, max_new_tokens=64) for _ in range(2)]
            decoders[1]._forward = decoders[1]._transformers_forward
            for decoder in decoders:
                decoder.admit([prompt.token_ids for prompt in PROMPTS], 2)
            for step in range(5):
                tokens = (torch.arange(2 * len(PROMPTS)) * 7 + step) % VOCABULARY["vocab_size"]
                lean, full = (decoder.step(tokens) for decoder in decoders)
                # transformers rounds its norms to fp32 whatever the dtype of the model.
                torch.testing.assert_close(lean, full, atol=2e-6, rtol=0)
