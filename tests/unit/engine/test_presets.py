"""The presets for GPUs, as DeepSpeed gets them."""

import pytest

from rltrain import cli
from rltrain.engine.deepspeed import deepspeed_dict


@pytest.mark.parametrize("name", ["one_gpu", "one_node", "several_nodes", "offload"])
def test_micro_batches_add_up_in_fp32(name):
    config = cli.compose(["+experiment=quickstart", f"deepspeed={name}", "model.dtype=bfloat16"])
    made = deepspeed_dict(config.deepspeed, config.optimizer, dtype=config.model.dtype)
    assert made["data_types"] == {"grad_accum_dtype": "fp32"} and made["bf16"] == {"enabled": True}
