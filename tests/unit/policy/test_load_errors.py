"""Models that cannot be trained as they are: one line with the key, or a slower path that is right."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rltrain.config import LoraConfig
from rltrain.errors import ConfigError
from rltrain.policy.load import PretrainedConfig, load_policy, save_policy
from rltrain.policy.tiny import character_tokenizer

SMALL = {"vocab_size": 101, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}


def saved(folder, name: str, **values) -> str:
    """A small model of an architecture of transformers with the character tokenizer."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**values)
    made = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    made.from_config(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def llama(tmp_path):
    return saved(tmp_path / "llama", "Llama", **SMALL)


def refused(path: str, **options) -> str:
    with pytest.raises(ConfigError) as error:
        load_policy(PretrainedConfig(path=path, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_attention_that_the_model_refuses_falls_back(tmp_path, caplog):
    path = saved(tmp_path, "Gemma2", **SMALL, sliding_window=16)
    with caplog.at_level(logging.WARNING, logger="rltrain"):
        model = load_policy(PretrainedConfig(path=path)).model
    assert model.config._attn_implementation == "eager"
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("rltrain")]
    assert message.startswith("model.attn_implementation=sdpa: refused (ValueError: Gemma2ForCausalLM does not support")
    assert message.endswith("; eager is used instead")


def test_attention_that_is_not_installed_falls_back(llama, caplog):
    with caplog.at_level(logging.WARNING, logger="rltrain"):
        policy = load_policy(PretrainedConfig(path=llama, attn_implementation="flash_attention_2"))
    plain = load_policy(PretrainedConfig(path=llama, attn_implementation="eager"))
    ids = torch.tensor([[7, 8, 9]])
    assert torch.equal(policy.model(ids).logits, plain.model(ids).logits)
    assert "model.attn_implementation=flash_attention_2: refused (" in caplog.text


def test_a_supported_attention_stays(llama):
    assert load_policy(PretrainedConfig(path=llama)).model.config._attn_implementation == "sdpa"


def test_an_encoder_decoder(tmp_path):
    path = saved(tmp_path, "T5", vocab_size=101, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    assert refused(path) == f"model.path={path}: t5 is an encoder-decoder model; give a causal language model"


def test_weights_that_are_cut_off(llama):
    file = Path(llama) / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    message = refused(llama)
    assert message.startswith(f"model.path={llama}: cannot be loaded (SafetensorError: ")
    assert message.endswith("; a file of weights is cut off or damaged; copy the model again")


def test_weights_that_are_not_all_there(llama):
    file = f"{llama}/model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file, {"format": "pt"})
    assert refused(llama) == (
        f"model.path={llama}: 1 weights are in no file and would be random, the first is ['lm_head.weight']; "
        "give the folder of a whole causal language model"
    )


def test_weights_that_are_no_numbers(llama):
    file = f"{llama}/model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.full((101, 16), torch.nan)}, file, {"format": "pt"})
    message = refused(llama)
    assert "1 weights hold NaN or infinity, the first is ['lm_head.weight']; give weights from before" in message


def test_weights_of_another_shape(llama):
    file = f"{llama}/model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(5, 16)}, file, {"format": "pt"})
    assert refused(llama).startswith(f"model.path={llama}: cannot be loaded (")


@pytest.mark.parametrize("text", ["{", '{"model_type": "nothing_of_the_kind"}', "{}"])
def test_a_config_that_says_nothing(llama, text):
    (Path(llama) / "config.json").write_text(text)
    assert refused(llama).startswith(f"model.path={llama}: cannot be loaded (")


def test_lora_names_that_match_nothing_are_told_what_there_is(tmp_path):
    path = saved(tmp_path, "GPT2", vocab_size=101, n_embd=16, n_layer=1, n_head=2)
    assert refused(path, lora=LoraConfig(rank=2)) == (
        "model.lora.target_modules: no module of GPT2LMHeadModel is called q_proj, k_proj, v_proj, o_proj; "
        "set some of c_attn, c_fc, c_proj, lm_head, wpe, wte"
    )


def test_a_single_lora_name_that_matches_nothing_is_refused_too(llama):
    message = refused(llama, lora=LoraConfig(rank=2, target_modules=["q_proj", "qkv_proj"]))
    assert message.startswith(
        "model.lora.target_modules: no module of LlamaForCausalLM is called qkv_proj; set some of "
    )
    policy = load_policy(
        PretrainedConfig(path=llama, lora=LoraConfig(rank=2, target_modules=["layers.0.self_attn.q_proj"]))
    )
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2


def test_a_module_that_lora_cannot_adapt(llama):
    assert "model.lora.target_modules=['norm']: " in refused(llama, lora=LoraConfig(rank=2, target_modules=["norm"]))


@pytest.mark.parametrize("path", ["~no_such_user/x", "./no_such_folder"])
def test_a_folder_that_is_not_there(path):
    assert refused(path).startswith(f"model.path={path}: no such folder; ")


@pytest.mark.parametrize("package", ["no_such_package", "no_such_package.sub", ".", ""])
def test_a_package_that_is_not_there(package):
    assert refused("x", package=package).startswith(f"model.package={package}: not installed; ")


LORA = LoraConfig(rank=2)


@pytest.fixture
def adapters(llama, tmp_path):
    save_policy(load_policy(PretrainedConfig(path=llama, lora=LORA)), tmp_path / "adapters")
    return tmp_path / "adapters"


def test_adapters_that_are_cut_off(adapters):
    file = adapters / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    assert refused(str(adapters), lora=LORA).startswith(f"model.path={adapters}: adapters cannot be loaded (")


@pytest.mark.parametrize("lora", [LORA, LoraConfig()])
def test_adapters_that_are_not_all_there(adapters, lora):
    file = adapters / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in sorted(weights)[:8]}, file, {"format": "pt"})
    message = refused(str(adapters), lora=lora)
    assert message.startswith(f"model.path={adapters}: adapters cannot be loaded (Found missing adapter keys ")
    assert message.endswith("; give the folder of whole adapters of this base model")


@pytest.mark.parametrize("lora", [LORA, LoraConfig()])
def test_adapters_that_are_no_numbers(adapters, lora):
    file = adapters / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name] * torch.nan}, file, {"format": "pt"})
    assert refused(str(adapters), lora=lora).startswith(f"model.path={adapters}: 1 weights hold NaN or infinity, ")


def test_adapters_of_another_alpha_and_other_modules(adapters, caplog):
    def told(lora):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="rltrain"):
            load_policy(PretrainedConfig(path=str(adapters), lora=lora))
        return caplog.messages

    assert told(LORA) == []
    assert told(LoraConfig()) == []
    assert told(LoraConfig(rank=2, alpha=99, target_modules=["up_proj"])) == [
        f"model.lora.alpha=99: {adapters} holds adapters of lora_alpha=32.0, which is used",
        f"model.lora.target_modules=['up_proj']: {adapters} holds adapters of "
        "['k_proj', 'o_proj', 'q_proj', 'v_proj'], which are used",
    ]


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("base_model.json", "{", "JSONDecodeError: "),
        ("base_model.json", "{}", "KeyError: 'kind'"),
        ("base_model.json", "[1]", "TypeError: "),
        ("base_model.json", json.dumps({"kind": "pretrained", "foo": 1}), "TypeError: "),
        ("adapter_config.json", "{", "JSONDecodeError: "),
        ("adapter_config.json", "{}", "KeyError: 'base_model_name_or_path'"),
    ],
)
def test_adapters_whose_base_cannot_be_read(adapters, name, text, cause):
    (adapters / "base_model.json").unlink()
    (adapters / name).write_text(text)
    message = refused(str(adapters), lora=LORA)
    start = f"model.path={adapters}: its adapter_config.json or base_model.json cannot be read ({cause}"
    assert message.startswith(start) and message.endswith("); copy the adapters again")
