"""TRL's GRPOTrainer with our estimators, and its loss as an oracle for ours on one fixed batch."""

import dataclasses
import os
import socket

import datasets
import pytest
import torch
import trl
from transformers import Qwen3Config, Qwen3ForCausalLM

from rltrain import registry
from rltrain.advantages.check import EstimatorError
from rltrain.advantages.group import GroupConfig, group_advantages
from rltrain.advantages.spae import SpaeConfig
from rltrain.advantages.tempo import TempoConfig, tempo_advantages
from rltrain.batching.collate import collate
from rltrain.batching.masks import loss_masks
from rltrain.compat.trl import GRPOTrainer, check_hooks, resolve, row_turns, sampled_logprobs
from rltrain.config import AdvantageConfig
from rltrain.errors import ConfigError, RunError
from rltrain.loss import policy_loss
from rltrain.losses.surrogate import SurrogateConfig
from rltrain.policy.logprobs import LogprobModel
from rltrain.policy.tiny import character_tokenizer
from rltrain.registry import register
from rltrain.types import Advantages, Completion, Group, Need, Problem, Prompt, Turn, UnknownLogprobs, among_observed

TOKENIZER = character_tokenizer("0123456789+-*={}\\boxed?.\n ")
MAX_TOKENS = 12


def tiny_model():
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
        bos_token_id=None,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config)


def arguments(folder, **options):
    """Every default that matters, set: they drift between TRL's releases."""
    settings = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "num_iterations": 1,
        "num_generations": 4,
        "max_completion_length": MAX_TOKENS,
        "max_steps": 2,
        "temperature": 1.0,
        "beta": 0.0,
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "importance_sampling_level": "token",
        "scale_rewards": "group",
        "mask_truncated_completions": False,
        "top_entropy_quantile": 1.0,
        "use_vllm": False,
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "seed": 5,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return trl.GRPOConfig(output_dir=str(folder), **settings | options)


def reward(completion_ids, **columns):
    """A function of the ids; the third row abstains."""
    return [None if i == 2 else float(sum(ids) % 7) for i, ids in enumerate(completion_ids)]


def dataset():
    return datasets.Dataset.from_dict(
        {"prompt": ["1+1=", "12*2=", "9-4=?", "7="] * 4, "answer": ["2", "24", "5", "7"] * 4}
    )


class Recording(GRPOTrainer):
    """Keeps what every generation batch came out as."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.outputs = [*getattr(self, "outputs", []), (output, self._scored, list(self._logs["advantages"]))]
        return output


def trained(folder, advantage, trainer=Recording, advantage_options=None, rollout_func=None, **options):
    ours = {} if advantage is None else {"advantage": advantage, "advantage_options": advantage_options}
    one = trainer(
        model=tiny_model(),
        reward_funcs=reward,
        args=arguments(folder, **options),
        train_dataset=dataset(),
        processing_class=TOKENIZER,
        rollout_func=rollout_func,
        **ours,
    )
    one.train()
    return one


def test_tempo_in_trl(tmp_path):
    trainer = trained(tmp_path, TempoConfig())
    assert trainer.state.global_step == 2
    for output, scored, logged in trainer.outputs:
        ids, rewards = scored.completion_ids, scored.rewards_per_function[:, 0].double()
        assert rewards.isnan().tolist() == [i == 2 for i in range(8)]
        assert output["advantages"].shape == output["completion_ids"].shape
        expected = [*tempo_advantages(ids[:4], rewards[:4]), *tempo_advantages(ids[4:], rewards[4:])]
        for row_T, values_T in zip(output["advantages"], expected, strict=True):
            torch.testing.assert_close(row_T[: len(values_T)].double(), values_T, atol=1e-6, rtol=0)
            assert not row_T[len(values_T) :].any()
        assert logged[-8:] == pytest.approx([float(values_T.mean()) for values_T in expected])
    assert "tempo/nonzero_td_share" in {key for row in trainer.state.log_history for key in row}


def test_the_group_estimator_trains_as_trl_itself(tmp_path):
    """TRL's own advantage is ours with eps 1e-4: the same losses and weights after two steps."""
    ours = trained(tmp_path, GroupConfig(eps=1e-4))
    theirs = trained(tmp_path, None, trainer=trl.GRPOTrainer)
    losses = [[row["loss"] for row in one.state.log_history if "loss" in row] for one in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_an_estimator_that_probes_uses_the_trainers_model(tmp_path):
    trainer = trained(tmp_path, SpaeConfig(delimiter="1", probe="\\boxed{", continuations=2, probe_max_tokens=3))
    steps = [row["spae/steps"] for row in trainer.state.log_history if "spae/steps" in row]
    assert len(steps) == 2 and max(steps) > 0
    output, scored, _ = trainer.outputs[0]
    values = torch.cat(
        [
            row_T[: len(ids)]
            for i, (row_T, ids) in enumerate(zip(output["advantages"], scored.completion_ids, strict=True))
            if i != 2
        ]
    )
    assert abs(float(values.mean())) < 1e-5
    assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-5)


def _train_on_a_rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    trainer = trained(folder / str(rank), TempoConfig(), per_device_train_batch_size=2, max_steps=1)
    output, scored, _ = trainer.outputs[0]
    torch.save((output["advantages"], scored.completion_ids, scored.rewards_per_function[:, 0]), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_group_spread_over_two_processes_is_one_group(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_train_on_a_rank, (port, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    ids = [row for _, completion_ids, _ in ranks for row in completion_ids]
    expected = tempo_advantages(ids, ranks[0][2].double())
    assert len(ids) == 4 and any(values_T.any() for values_T in expected)
    found = [row_T for advantages_BT, _, _ in ranks for row_T in advantages_BT]
    for row_T, values_T in zip(found, expected, strict=True):
        torch.testing.assert_close(row_T[: len(values_T)].double(), values_T, atol=1e-6, rtol=0)


def test_estimators_are_found_by_name_or_refused():
    assert resolve("tempo").name == resolve(TempoConfig()).name == "advantage=tempo"
    with pytest.raises(ConfigError, match="advantage=nonsense: unknown; set one of"):
        resolve("nonsense")

    @dataclasses.dataclass(kw_only=True)
    class NeedyConfig(AdvantageConfig):
        pass

    register("advantage", "needy", NeedyConfig, needs={Need.SCORER, Need.PROBES})(lambda groups, config, context: None)
    try:
        with pytest.raises(
            ConfigError, match="^advantage=needy: needs SCORER, which TRL's trainer cannot give; train w"
        ):
            resolve(NeedyConfig())
    finally:
        del registry._PARTS["advantage", "needy"]


# --- a plain function, and what it is given ------------------------------------------------------------------------


def spread(groups, value):
    """``value(group, completion)`` on each token."""
    return Advantages(
        values=[
            [torch.full((len(one.token_ids),), float(value(group, one))) for one in group.completions]
            for group in groups
        ]
    )


class Seen:
    """An estimator that keeps the groups it is given."""

    def __init__(self, value=lambda group, one: 1.0):
        self.value, self.groups, self.options = value, [], None

    def __call__(self, groups, options, context):
        self.groups.append(groups)
        self.options = options
        return spread(groups, self.value)


def test_a_plain_function_is_given_groups_and_its_options(tmp_path):
    seen = Seen()
    trainer = trained(tmp_path, seen, advantage_options={"gamma": 0.5}, max_steps=1)
    (groups,), (output, scored, _) = seen.groups, trainer.outputs[0]
    assert seen.options == {"gamma": 0.5}
    assert [one.token_ids for group in groups for one in group.completions] == list(map(tuple, scored.completion_ids))
    for group, row in zip(groups, scored.rows[::4], strict=True):
        assert (group.prompt.problem.prompt, group.prompt.problem.answer) == (row["prompt"], row["answer"])
        assert group.prompt.token_ids == tuple(TOKENIZER(row["prompt"])["input_ids"])
        for one in group.completions:
            assert one.text == TOKENIZER.decode(one.token_ids, skip_special_tokens=True)
            assert one.finish == ("stop" if one.token_ids[-1] == TOKENIZER.eos_token_id else "length")
    abstains = torch.arange(8) == 2  # its reward is None: 0, whatever the function says
    assert output["advantages"][:, 0].tolist() == (~abstains).float().tolist()


def test_a_function_that_returns_nonsense_is_named(tmp_path):
    with pytest.raises(
        EstimatorError, match=r": group 0 \(problem 0\), completion 0: the value of token 0 is nan, exp"
    ):
        trained(tmp_path, Seen(lambda group, one: float("nan")))


def reads_logprobs(groups, options, context):
    return spread(groups, lambda group, one: sum(one.logprobs))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "TRL keeps none where each batch trains the weights that sampled it"),
        ({"num_iterations": 2, "top_k": 5}, "top_k, top_p, min_p, repetition_penalty or generation_kwargs change the"),
        (
            {"num_iterations": 2, "top_p": 0.9},
            "top_k, top_p, min_p, repetition_penalty or generation_kwargs change the",
        ),
        (
            {"num_iterations": 2, "generation_kwargs": {"no_repeat_ngram_size": 3}},
            "top_k, top_p, min_p, repetition_pen",
        ),
    ],
)
def test_log_probs_that_trl_does_not_keep_are_unknown_and_not_zero(options, reason, tmp_path):
    with pytest.raises(RunError) as caught:
        trained(tmp_path, reads_logprobs, **options)
    assert str(caught.value).startswith(f"Completion.logprobs: unknown, {reason}")
    assert str(caught.value).endswith("; what reads sampled log-probs cannot run here")


def test_log_probs_of_the_model_at_generation_are_the_samplers_where_nothing_truncates(tmp_path):
    """With two passes over a batch TRL keeps them; an independent forward of the untrained model agrees."""
    seen = Seen()
    trained(tmp_path, seen, num_iterations=2, temperature=0.7, max_steps=1)
    model = tiny_model()
    for group in seen.groups[0]:
        for one in group.completions:
            ids, start = torch.tensor([[*group.prompt.token_ids, *one.token_ids]]), len(group.prompt.token_ids)
            with torch.no_grad():
                logprobs_TV = (model(ids).logits[0, start - 1 : -1] / 0.7).log_softmax(-1)
            expected_T = logprobs_TV.gather(-1, ids[0, start:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(one.logprobs), expected_T, atol=1e-5, rtol=0)


def test_dropout_makes_the_models_log_probs_another_distributions(tmp_path):
    trainer = trained(tmp_path, Seen(), num_iterations=2, max_steps=1)
    assert trainer._why_old_logprobs_differ() == ""
    trainer.model.add_module("adapter_dropout", torch.nn.Dropout(0.1))
    assert trainer._why_old_logprobs_differ() == "dropout is on while TRL samples (set disable_dropout=True)"
    trainer.model.eval()
    assert trainer._why_old_logprobs_differ() == ""


def test_a_samplers_own_log_probs_reach_the_estimator(tmp_path):
    """A ``rollout_func`` returns what vLLM does: ids and the log-probs they were drawn with."""

    def rollout(prompts, trainer):
        ids = [[5, 6, TOKENIZER.eos_token_id] if i % 2 else [5, 7] for i in range(len(prompts))]
        logprobs = [[-0.25 * i, float("nan") if i == 4 else -0.5, -1.0][: len(row)] for i, row in enumerate(ids)]
        prompt_ids = [TOKENIZER(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": logprobs}

    seen = Seen()
    trained(tmp_path, seen, rollout_func=rollout, max_steps=1)
    logprobs = [one.logprobs for group in seen.groups[0] for one in group.completions]
    assert logprobs[:2] == [(0.0, -0.5), (-0.25, -0.5, -1.0)] and logprobs[7] == (-1.75, -0.5, -1.0)
    assert logprobs[4] == UnknownLogprobs(reason="the sampler gave none for some of the completion's tokens")


def test_what_a_tool_wrote_is_an_observation():
    """The second row has a tool's token between turns of one token each. The third begins and ends with a tool's."""
    output = {
        "old_per_token_logps": torch.tensor([[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0], [0.0, -6.0, 0.0]]),
        "sampling_per_token_logps": torch.tensor([[-1.5, -2.5, 0.0], [-3.5, 0.0, -5.5], [0.0, -6.5, 0.0]]),
        "tool_mask": torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 0]]),
    }
    first, *others = sampled_logprobs(output, [2, 3, 3], not_the_samplers="")
    assert first == (-1.5, -2.5)
    assert [[value for value in row if value == value] for row in others] == [[-3.5, -5.5], [-6.5]]
    none, second, third = row_turns(output, [[5, 6], [5, 6, 7], [5, 6, 7]], lambda ids: "".join(map(str, ids)))
    assert none == ()
    assert second == (Turn(written=1, observed=1, called=True, text="5", reply="6"), Turn(written=1, text="7"))
    assert third == (
        Turn(written=0, observed=1, called=True, reply="5"),
        Turn(written=1, observed=1, called=True, text="6", reply="7"),
    )
    assert sampled_logprobs({}, [1], not_the_samplers="")[0].reason.startswith("TRL keeps none where")


def test_another_trl_is_refused_with_the_remedy():
    class Changed(trl.GRPOTrainer):
        def _calculate_rewards(self, rows):
            return rows

    with pytest.raises(ImportError, match=r"trl 9.9: GRPOTrainer._calculate_rewards takes .* pip install 'trl>=1.16"):
        check_hooks(Changed, "9.9")


PROMPTS = ["1+1=", "12*2="]
TEXTS = [["2", "1+1=2\n3", "4.", "\\boxed{2}"], ["24", "2*12=24\n", "9", "12+12=24"]]
REWARDS = [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]]


def ids_of(text):
    return tuple(TOKENIZER(text)["input_ids"])


def fixed_groups():
    """Old log-probs near those of the model, so that some ratios are clipped and some are not."""
    model, noise, groups = tiny_model(), torch.Generator().manual_seed(1), []
    for prompt, texts, rewards in zip(PROMPTS, TEXTS, REWARDS, strict=True):
        completions = []
        for text in texts:
            ids, start = [*ids_of(prompt), *ids_of(text), TOKENIZER.eos_token_id], len(ids_of(prompt))
            with torch.no_grad():
                logprobs_TV = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            own_T = logprobs_TV.gather(-1, torch.tensor(ids[start:])[:, None])[:, 0]
            old_T = own_T + 0.3 * torch.randn(len(own_T), generator=noise)
            completions.append(Completion(token_ids=tuple(ids[start:]), logprobs=tuple(old_T.tolist()), finish="stop"))
        groups.append(
            Group(
                prompt=Prompt(problem=Problem(id=prompt, prompt=prompt, answer=""), token_ids=ids_of(prompt)),
                completions=tuple(completions),
                rewards_G=torch.tensor(rewards),
            )
        )
    return groups


def with_turns(groups):
    """Every completion of three ids and more has a tool's id in its middle; the last of each group was cut."""

    def talk(one, finish):
        observed = int(len(one.token_ids) > 2)
        turns = (Turn(written=1, observed=observed), Turn(written=len(one.token_ids) - 1 - observed))
        written = one.logprobs[:1] + one.logprobs[1 + observed :]
        logprobs = among_observed(written, turns, float("nan"))
        return dataclasses.replace(one, turns=turns, logprobs=logprobs, finish=finish)

    return [
        dataclasses.replace(
            group,
            completions=tuple(talk(one, "length" if g == 3 else "stop") for g, one in enumerate(group.completions)),
        )
        for group in groups
    ]


def padded(rows, *, left, fill=0):
    width = max(map(len, rows))
    return torch.tensor(
        [[fill] * (width - len(r)) * left + list(r) + [fill] * (width - len(r)) * (not left) for r in rows]
    )


def trl_batch(groups, advantages):
    """With turns as TRL has them under mask_truncated_completions: both masks are 0 in rows that were cut."""
    completions = [completion for group in groups for completion in group.completions]
    prompts = [group.prompt.token_ids for group in groups for _ in group.completions]
    mask = padded([[1] * len(completion.token_ids) for completion in completions], left=False)
    turns = any(completion.turns for completion in completions)
    written = padded([completion.written_T for completion in completions], left=False, fill=True).int()
    kept = torch.tensor([[int(completion.finish == "stop")] for completion in completions])
    return {
        "prompt_ids": padded(prompts, left=True),
        "prompt_mask": padded([[1] * len(ids) for ids in prompts], left=True),
        "completion_ids": padded([completion.token_ids for completion in completions], left=False),
        "completion_mask": mask * kept,
        "advantages": torch.cat(advantages).float(),
        "old_per_token_logps": padded(
            [completion.logprobs for completion in completions], left=False, fill=0.0
        ).nan_to_num(),
        "num_items_in_batch": (mask * kept * written).sum(),
        **({"tool_mask": written * kept} if turns else {}),
    }


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(("micro_batches", "masked"), [(1, False), (4, False), (4, True)], ids=["1", "4", "masked"])
@pytest.mark.parametrize(
    ("trl_options", "loss", "scale"),
    [
        ({"loss_type": "grpo", "epsilon_high": 0.2}, {"aggregation": "sequence"}, "std"),
        ({"loss_type": "dr_grpo", "epsilon_high": 0.2}, {"aggregation": "constant"}, "none"),
        ({"loss_type": "dapo", "epsilon_high": 0.28}, {"aggregation": "token", "clip_high": 0.28}, "std"),
        # TRL clips CISPO's ratio at epsilon_high itself, the paper and we at 1 + eps_high.
        (
            {"loss_type": "cispo", "epsilon_high": 1.28},
            {"aggregation": "token", "surrogate": "cispo", "clip_high": 0.28},
            "std",
        ),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
            {"aggregation": "sequence", "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
            "std",
        ),
    ],
    ids=["grpo", "dr_grpo", "dapo", "cispo", "gspo"],
)
def test_loss_and_gradient_equal_trls(tmp_path, trl_options, loss, scale, micro_batches, masked):
    groups = with_turns(fixed_groups()) if masked else fixed_groups()
    advantages = [group_advantages(group.rewards_G, scale=scale) for group in groups]
    rows = 8 // micro_batches
    trainer = trl.GRPOTrainer(
        model=tiny_model(),
        reward_funcs=reward,
        args=arguments(
            tmp_path,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=micro_batches,
            steps_per_generation=micro_batches,
            **trl_options,
        ),
        train_dataset=dataset(),
        processing_class=TOKENIZER,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = micro_batches
    whole, theirs = trl_batch(groups, advantages), 0.0
    for start in range(0, 8, rows):
        part = {name: value[start : start + rows] if value.ndim else value for name, value in whole.items()}
        value = trainer._compute_loss(trainer.model, part)
        value.backward()
        theirs += float(value.detach())

    model, config, ours = LogprobModel(tiny_model(), temperature=1.0), SurrogateConfig(**loss), 0.0
    clipped = 0.0
    values = [
        [one.expand(len(ids)) for one, ids in zip(advantages_G, group.completion_ids, strict=True)]
        for advantages_G, group in zip(advantages, groups, strict=True)
    ]
    budget = 1000 if micro_batches == 1 else 32
    options = {"aggregation": config.aggregation, "token_budget": budget, "max_new_tokens": MAX_TOKENS}
    batches, _ = collate(groups, values, masks=loss_masks(groups, mask_truncated=masked), **options)
    assert (len(batches) == 1) == (micro_batches == 1)
    for batch in batches:
        logprobs_N, entropy_N, *_ = model(batch)
        output = policy_loss(logprobs_N, batch, config, entropy_N=entropy_N)
        output.loss.backward()
        ours += float(output.loss.detach())
        clipped += output.metrics["clip_ratio/region_mean"].total
    assert 0 < clipped < sum(len(ids) for group in groups for ids in group.completion_ids)
    wanted, found = gradient(trainer.model), gradient(model.model)
    difference = float((found - wanted).norm() / wanted.norm())
    print(f"parity: loss {ours:.7f} and {theirs:.7f}, gradients differ by {difference:.1e} of their norm")
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert difference < 1e-5
