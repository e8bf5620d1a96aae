"""The check before the first step with weights that ZeRO 3 cuts up, on two ranks."""

from two_ranks import PERSISTENCE, assert_same_run, train

SHARDED = ["deepspeed.zero_stage=3", *(f"+deepspeed.extra.zero_optimization.{key}=0" for key in PERSISTENCE)]


def test_adapters_on_the_head_are_checked_and_trained_in_shards(tmp_path):
    """Perturbed adapters are put back on every rank: the run is that of one rank."""
    lora = ["model.lora.rank=4", "model.lora.target_modules=[q_proj,lm_head]", "steps=2", "evaluation.every_steps=0"]
    one = train(tmp_path / "one", 1, *lora)
    assert one.returncode == 0, one.stderr
    two = train(tmp_path / "two", 2, *SHARDED, *lora)
    assert two.returncode == 0, two.stderr
    assert_same_run(tmp_path / "two", tmp_path / "one")
