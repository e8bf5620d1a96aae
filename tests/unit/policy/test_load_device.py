"""Weights of a folder go straight to a GPU, a tensor at a time; ZeRO 3 and GGUF files have their own ways."""

import pytest
import torch
import transformers

from rltrain.config import DeepSpeedConfig
from rltrain.engine.deepspeed import sharded_loading
from rltrain.policy.from_pretrained import _placement, weights_on
from rltrain.policy.load import PretrainedConfig, load_frozen, load_policy, save_policy
from rltrain.policy.tiny import TinyConfig

GPU = torch.device("cuda", 1)


@pytest.fixture
def folder(tmp_path):
    save_policy(load_policy(TinyConfig()), tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def asked(monkeypatch):
    """What transformers is asked for, on a machine where that device cannot be."""
    maps, load = [], transformers.AutoModelForCausalLM.from_pretrained

    def on_the_cpu(*arguments, device_map=None, **options):
        maps.append(device_map)
        return load(*arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", on_the_cpu)
    return maps


def test_weights_are_asked_for_on_the_device(folder, asked):
    config = PretrainedConfig(path=folder)
    for load in (load_policy, load_frozen):
        load(config, device=GPU)
        load(config, device=torch.device("cpu"))
        load(config)
    assert asked == [{"": GPU}, None, None] * 2


def test_the_device_is_forgotten_after_a_failure(tmp_path, asked):
    with pytest.raises(Exception, match="model.path"):
        load_policy(PretrainedConfig(path=str(tmp_path)), device=GPU)
    assert _placement({}) == {}


def test_zero_3_and_gguf_files_place_weights_themselves():
    with weights_on(GPU):
        assert _placement({}) == {"device_map": {"": GPU}}
        assert _placement({"gguf_file": "model.gguf"}) == {}
        with sharded_loading(DeepSpeedConfig(zero_stage=3), dtype="float32"):
            assert _placement({}) == {}
