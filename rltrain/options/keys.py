"""Every config key by its full dotted path, and which of them a mistyped or foreign key means."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

from rltrain.config import RunConfig
from rltrain.errors import ConfigError
from rltrain.registry import parts

CLOSE = 0.75  # of difflib's ratio: below it a guess is as likely wrong as right
ANY = "*"  # in a path, the name that a user gives a reward
FIRST = "answer"  # the name that stands for ANY where a user gave none

# What users of TRL, verl and OpenRLHF type, by the last part of the key, and the key here.
SYNONYMS = {
    "optimizer.learning_rate": "lr actor_lr actor_learning_rate step_size",
    "optimizer.max_grad_norm": "grad_clip gradient_clipping clip_grad max_norm grad_norm",
    "optimizer.schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler lr_scheduler_name",
    "optimizer.warmup_steps": "lr_warmup_steps num_warmup_steps warmup",
    "optimizer.betas": "adam_betas adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.eps": "adam_epsilon adam_eps",
    "optimizer.weight_decay": "wd l2",
    "loss.kl_coef": "kl beta kl_coeff kl_beta kl_loss_coef init_kl_coef kl_coefficient kl_weight use_kl_loss",
    "loss.kl_estimator": "kl_loss_type kl_penalty kl_type",
    "loss.clip_low": "epsilon epsilon_low eps_clip eps_clip_low clip clip_eps clip_range cliprange clip_ratio "
    "clip_ratio_low",
    "loss.clip_high": "epsilon_high eps_clip_high clip_ratio_high",
    "loss.dual_clip": "clip_ratio_c delta",
    "loss.entropy_coef": "entropy_coeff entropy_loss_coef entropy entropy_bonus ent_coef",
    "loss.aggregation": "loss_type loss_agg_mode loss_aggregation",
    "loss.ratio": "importance_sampling_level",
    "loss.importance_correction": "tis vllm_importance_sampling_correction importance_sampling_correction",
    "loss.importance_cap": "tis_imp_ratio_cap vllm_importance_sampling_cap",
    "batch.group_size": "n num_generations rollout_n n_samples_per_prompt samples_per_prompt num_samples",
    "batch.prompts_per_step": "train_batch_size per_device_train_batch_size rollout_batch_size batch_size "
    "global_batch_size prompts_per_batch",
    "batch.update_epochs": "num_iterations ppo_epochs max_epochs mu",
    "batch.token_budget": "ppo_max_token_len_per_gpu max_tokens_per_gpu micro_batch_size micro_train_batch_size "
    "gradient_accumulation_steps ppo_micro_batch_size_per_gpu",
    "batch.dynamic_sampling": "filter_groups dynamic_filtering",
    "sampling.max_new_tokens": "max_tokens max_completion_length max_response_length response_length max_length "
    "generate_max_len max_completion_tokens max_gen_len",
    "sampling.max_prompt_tokens": "max_prompt_length prompt_max_len prompt_length max_prompt_len",
    "sampling.temperature": "temp",
    "sampling.stop": "stop_words stop_strings",
    "model.path": "model_name_or_path model_name pretrain model_path pretrained_model_name_or_path",
    "model.dtype": "bf16 fp16 torch_dtype precision",
    "model.attn_implementation": "attn flash_attn attention_implementation use_flash_attention",
    "model.gradient_checkpointing": "enable_gradient_checkpointing grad_checkpoint",
    "model.system": "system_prompt",
    "model.lora.rank": "lora_rank lora_r r",
    "model.lora.alpha": "lora_alpha",
    "model.lora.dropout": "lora_dropout",
    "model.lora.target_modules": "lora_target_modules",
    "data.path": "dataset dataset_name prompt_data train_files dataset_path",
    "reference": "ref_model reference_model ref_model_path ref_path",
    "steps": "max_steps total_training_steps num_train_steps num_steps total_steps training_steps num_train_epochs "
    "num_epochs total_epochs epochs",
    "run_dir": "output_dir default_local_dir save_path ckpt_path out_dir logging_dir",
    "name": "experiment_name run_name trial_name",
    "checkpoint.every_steps": "save_steps save_freq save_interval",
    "checkpoint.keep_last": "save_total_limit max_actor_ckpt_to_keep max_ckpt_num",
    "checkpoint.resume": "resume_from_checkpoint resume_mode",
    "evaluation.every_steps": "eval_steps test_freq eval_every eval_interval",
    "tracking.wandb": "report_to use_wandb",
    "tracking.project": "project_name wandb_project",
    "deepspeed.zero_stage": "zero stage zero_optimization_stage",
    "deepspeed.offload_optimizer": "offload cpu_offload optimizer_offload adam_offload",
    "rewards.*.weight": "reward_weights reward_weight",
    "rollout=vllm": "use_vllm vllm",
    "algorithm=NAME": "adv_estimator advantage_estimator",
    "reward@rewards.answer=NAME": "reward_funcs reward_fn reward_function custom_reward_function reward_model",
}
_MEANT = {word: path for path, words in SYNONYMS.items() for word in words.split()}


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key, its type, and the choices it belongs to (``rollout=vllm``); none where it always exists."""

    path: str
    type: Any
    choices: tuple[str, ...] = ()


class Placed(Protocol):
    """What a suggestion reads of a key."""

    @property
    def path(self) -> str:
        """The dotted path."""
        ...

    @property
    def choices(self) -> tuple[str, ...]:
        """The choices that it belongs to; none where it always exists."""
        ...


def known_keys() -> dict[str, Key]:
    """All keys by path; those that belong to a choice come last."""
    found: dict[str, Key] = {}
    for key in _keys_of(RunConfig, ""):
        before = found.get(key.path)
        if before is None:
            found[key.path] = key
        elif before.choices:
            found[key.path] = Key(path=key.path, type=before.type, choices=(*before.choices, *key.choices))
    return dict(sorted(found.items(), key=lambda item: bool(item[1].choices)))


def _keys_of(owner: type, prefix: str, choices: tuple[str, ...] = (), inside: tuple[type, ...] = ()) -> Iterator[Key]:
    """Below ``owner``. Parts of a kind that it stands ``inside`` of, as data sets in a mixture, are left out."""
    hints = typing.get_type_hints(owner)
    for entry in fields(owner):
        path, hint = f"{prefix}{entry.name}", _without_none(hints[entry.name])
        if typing.get_origin(hint) is dict and is_dataclass(typing.get_args(hint)[1]):
            path, hint = f"{path}.{ANY}", typing.get_args(hint)[1]
        if not is_dataclass(hint):
            yield Key(path=path, type=hint, choices=choices)
            continue
        assert isinstance(hint, type)
        yield from _keys_of(hint, f"{path}.", choices, inside)
        for part in parts():
            if part.config is not hint and hint in part.config.__mro__ and hint not in inside:
                group = part.group if path == part.group else f"{part.group}@{path.replace(ANY, FIRST)}"
                yield from _keys_of(part.config, f"{path}.", (f"{group}={part.name}",), (*inside, hint))


def _without_none(hint: Any) -> Any:
    """The type of an optional field."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(each for each in typing.get_args(hint) if each is not type(None))
    return hint


def unknown(key: str) -> ConfigError:
    """The error about a key that does not exist, or not in the part that is chosen, with the key that was meant."""
    return ConfigError(f"{key}: no such key; {meant_by(key)}")


def meant_by(key: str) -> str:
    """``did you mean optimizer.learning_rate?``; where nothing is near, where the keys are listed."""
    keys = known_keys()
    exact = keys.get(pattern(key))
    if exact is not None and exact.choices:
        return f"it belongs to {_listed(exact.choices)}, which is not chosen"
    owner = _open_owner(key, keys)
    if owner is not None:
        choices = keys[pattern(owner)].choices
        needed = f" (of {_listed(choices)})" if choices else ""
        return f"{owner} takes any name, added with a plus: +{key}=VALUE{needed}"
    path = nearest(key, keys)
    if path is None:
        return _beside(pattern(key).rpartition(".")[0], keys)
    needed = f" (of {_listed(keys[path].choices)})" if path in keys and keys[path].choices else ""
    return f"did you mean {_named(path, key)}?{needed}"


def _beside(place: str, keys: Mapping[str, Key]) -> str:
    """The keys of a section that always exist, and the commands that list the others."""
    below = {path.removeprefix(f"{place}."): key for path, key in keys.items() if path.startswith(f"{place}.")}
    names = {path.partition(".")[0]: None for path, key in below.items() if not key.choices}
    if not below or ANY in place:
        return "rltrain help keys lists them"
    if not names:
        return f"rltrain help {place} lists those of its choices"
    others = f"; rltrain help {place} lists those of its choices" if any(key.choices for key in below.values()) else ""
    return f"the keys of {place} are {', '.join(names)}{others}"


def _open_owner(key: str, keys: dict[str, Key]) -> str | None:
    """The nearest parent of ``key`` that is a mapping from any name."""
    words = key.split(".")
    parents = [".".join(words[:count]) for count in range(len(words) - 1, 0, -1)]
    known = [(parent, keys[pattern(parent)]) for parent in parents if pattern(parent) in keys]
    return next((parent for parent, owner in known if typing.get_origin(owner.type) is dict), None)


def _listed(choices: tuple[str, ...]) -> str:
    return " or ".join(choices[:3]) + (" or others" if len(choices) > 3 else "")


def nearest(key: str, keys: Mapping[str, Placed]) -> str | None:
    """The path that ``key`` means, None if none is near.

    In this order: a synonym in the same place, a slip of the pen in the same place, the same word in another place, a
    synonym for another place, the same word of a part that is not chosen, alone or behind this part's place or name, a
    slip of the pen in any part of the path.
    """
    place, _, word = pattern(key).rpartition(".")
    synonym = _MEANT.get(word.casefold())
    candidates = [path for path in keys if path.rpartition(".")[0] == place]
    if synonym is not None:
        here = f"{place}.{synonym.rpartition('.')[2]}".lstrip(".")
        if here in keys:
            return here
    if slips := difflib.get_close_matches(word, [path.rpartition(".")[2] for path in candidates], n=1, cutoff=CLOSE):
        return f"{place}.{slips[0]}".lstrip(".")
    same = [path for path in keys if _plain(path.rpartition(".")[2]) == _plain(word)]
    same.sort(key=lambda path: path.count("."))  # of equal words that of the least depth
    always = [path for path in same if not keys[path].choices]
    chosen = [path for path in same if not place or _is_of(keys[path], place)]
    return _in_place(always, place) or synonym or _in_place(chosen, place) or _slip(place, word, keys)


def _is_of(key: Placed, place: str) -> bool:
    """Whether ``place`` is close to that of a key of a choice, or names the choice."""
    return _ratio(key.path.rpartition(".")[0], place) >= CLOSE or any(
        choice.endswith(f"={place}") for choice in key.choices
    )


def _in_place(paths: Sequence[str], place: str) -> str | None:
    """The path whose place is close to ``place``, else the first of those with the fewest parts."""
    near = (path for path in paths if _ratio(path.rpartition(".")[0], place) >= CLOSE)
    return next(near, min(paths, key=lambda path: path.count("."), default=None))


def _slip(place: str, word: str, keys: Mapping[str, Any]) -> str | None:
    """The path whose place and word are both close."""
    scored = []
    for path in keys:
        its_place, _, its_word = path.rpartition(".")
        scored.append((min(_ratio(its_place, place) if place else 1.0, _ratio(its_word, word)), path))
    best = max(score for score, _ in scored)
    return next(path for score, path in scored if score == best) if best >= CLOSE else None


def _ratio(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()


def _plain(word: str) -> str:
    return word.replace("_", "").replace("-", "").casefold()


def pattern(key: str) -> str:
    """The path with ANY for the name of a reward, or of a data set in a mixture."""
    words = key.split(".")
    if (place := _named_place(words)) is not None:
        words[place] = ANY
    return ".".join(words)


def _named_place(words: Sequence[str]) -> int | None:
    """Which word of a path is a name that a user gave; None where none is."""
    if words[0] in ("rewards", "eval_rewards") and len(words) > 2:
        return 1
    return (
        2 if words[0] in ("data", "eval_data", "cold_start_data") and words[1:2] == ["sources"] and words[3:] else None
    )


def _named(path: str, key: str) -> str:
    """The path with the user's name of the reward where there is one."""
    words = key.split(".")
    place = _named_place(words)
    return path.replace(ANY, FIRST if place is None else words[place])


def unknown_in(config: Any, prefix: str = "") -> list[str]:
    """Keys below ``config`` that no dataclass has: what ``+key=…`` adds to a config and nothing would read."""
    found = []
    for name, value in vars(config).items():
        path = f"{prefix}{name}"
        if name not in {entry.name for entry in fields(config)}:
            found.append(path)
        elif is_dataclass(value):
            found += unknown_in(value, f"{path}.")
        elif isinstance(value, dict):
            inner = {key: each for key, each in value.items() if is_dataclass(each)}
            found += [key for each in inner for key in unknown_in(inner[each], f"{path}.{each}.")]
    return found
