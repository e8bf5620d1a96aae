"""Checkpoints by parameter name: moved between ZeRO stages and ranks, adapters, consolidated exports, refusals."""

import collections
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import config, metrics
from torch import nn

from rltrain import cli, trainer
from rltrain.config import DeepSpeedConfig, OptimizerConfig
from rltrain.engine.deepspeed import Engine, NonFiniteError, sharded_loading
from rltrain.engine.zero_shards import Archive
from rltrain.errors import ConfigError, RunError
from rltrain.policy.load import load_frozen, load_policy
from rltrain.runs import checkpoint
from rltrain.runtime import dist

ROOT = Path(__file__).parents[2]
LORA = ["model.lora.rank=4", "evaluation.every_steps=0"]


class Small(nn.Module):
    """A weight of 15 elements, which no number of ranks divides well, a vector, and one that is not trained."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm = nn.Linear(3, 5, bias=False), nn.LayerNorm(5)
        self.fixed = nn.Linear(5, 1)
        self.fixed.requires_grad_(False)
        self.to(dtype)

    def forward(self, x):
        return self.norm(self.first(x)).square() @ torch.arange(5.0, dtype=x.dtype)


def small_engine(stage: int, dtype: str, seed: int) -> Engine:
    dist.setup(deadline_s=60)
    sizes = {f"stage3_{kind}_persistence_threshold": 0 for kind in ("param", "model")}
    extra = {"zero_optimization": sizes} if stage == 3 else {}
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    module = Small(seed, getattr(torch, dtype))
    return Engine(module, optimizer, DeepSpeedConfig(zero_stage=stage, extra=extra), dtype=dtype)


def step(engine: Engine, number: int, dtype: str) -> None:
    torch.manual_seed(number)
    inputs = torch.randn(4, 3).to(getattr(torch, dtype))
    engine.backward(engine(inputs).float().mean(), last=True)
    engine.step(learning_rate=1e-2)


def state(engine: Engine) -> dict[str, torch.Tensor]:
    return {f"{key}/{one.name}": value.clone() for one in engine.held() for key, value in one.tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 1), (1, 0), (2, 2)])
def test_weights_and_moments_move_between_stages_bit_for_bit(tmp_path, dtype, before, after):
    source = small_engine(before, dtype, seed=0)
    for number in range(3):
        step(source, number, dtype)
    source.save_state(tmp_path)
    target = small_engine(after, dtype, seed=1)
    target.load_state(tmp_path)
    assert {float(one.step) for one in target.held()} == {3.0}
    for name, value in state(source).items():
        assert torch.equal(state(target)[name], value), name
    weights = [dict(engine.full_parameters()) for engine in (source, target)]
    assert all(torch.equal(weights[1][name].cpu(), value.cpu()) for name, value in weights[0].items())
    for engine in (source, target):
        step(engine, 3, dtype)
    for name, value in state(source).items():
        torch.testing.assert_close(state(target)[name], value, rtol=1e-5, atol=1e-6)


def test_a_file_cut_anywhere_is_read_by_elements(tmp_path):
    """Two files with 11 and 4 of the 15 elements, as three ranks or two would need them."""
    source = small_engine(0, "float32", seed=0)
    step(source, 0, "float32")
    whole = source.save_state(tmp_path / "whole")
    tensors = load_file(whole)
    (tmp_path / "cut").mkdir()
    for rank, (low, high) in enumerate([(0, 11), (11, 15)]):
        entries = {name: {"start": low if name == "first.weight" else 0, "step": 1.0} for name in ("first.weight",)}
        pieces = {key: value[low:high].clone() for key, value in tensors.items() if key.endswith("first.weight")}
        if rank == 0:
            rest = {key: value for key, value in tensors.items() if "norm" in key}
            pieces |= rest
            entries |= {key.split("/")[1]: {"start": 0, "step": 1.0} for key in rest}
        path = tmp_path / "cut" / f"rank_{rank:05d}.safetensors"
        save_file(pieces, path, metadata={"shards": json.dumps(entries)})
    target = small_engine(3, "float32", seed=1)
    target.load_state(tmp_path / "cut")
    assert all(torch.equal(state(target)[key], value) for key, value in tensors.items())
    (tmp_path / "cut" / "rank_00001.safetensors").unlink()
    with pytest.raises(RunError, match="holds 11 of the 15 elements of first.weight that rank 0 needs"):
        target.load_state(tmp_path / "cut")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_overflows_stops_before_the_optimiser(stage):
    """DeepSpeed skips such a step in silence under ZeRO."""
    engine = small_engine(stage, "float32", seed=0)
    step(engine, 0, "float32")
    before = state(engine)
    engine.backward(engine(torch.randn(4, 3)).mean() * torch.tensor(float("inf")), last=True)
    with pytest.raises(NonFiniteError, match="the optimiser did not move"):
        engine.step(learning_rate=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in state(engine).items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps in bf16."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    trainer.fit(config(folder, "model.dtype=bfloat16", "evaluation.every_steps=0", "steps=2"))
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """One step of LoRA on a base that is loaded from a folder."""
    folder = tmp_path_factory.mktemp("adapted")
    base = load_policy(config(folder / "run", "model.init_seed=5").model)
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    trainer.fit(config(folder / "run", *LORA, "steps=1", f"model.path={folder / 'base'}"))
    return folder / "run"


def test_nothing_in_a_checkpoint_is_pickled(trained):
    (saved,) = checkpoint.list_checkpoints(trained)
    kinds = collections.Counter(path.suffix for path in saved.path.rglob("*") if path.is_file())
    assert set(kinds) == {".json", ".safetensors"}
    files = {str(path.relative_to(saved.path)) for path in saved.path.rglob("*") if path.is_file()}
    assert files == saved.manifest["files"].keys() | {"manifest.json"}


def export(run, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rltrain.export", *map(str, [run, "--to", *arguments])]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_export_in_fp32_has_the_weights_of_the_optimiser(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    result = export(trained, tmp_path / "out", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    archive = Archive(checkpoint.list_checkpoints(trained)[0].path / "optimizer")
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name in archive.names():
        assert torch.equal(exact[name.removeprefix("model.")].view(-1), archive.weight(name)), name
    rounded = load_file(checkpoint.list_checkpoints(trained)[0].policy / "model.safetensors")
    assert all(torch.equal(exact[name].bfloat16(), value) for name, value in rounded.items())
    assert any(not torch.equal(exact[name], value.float()) for name, value in rounded.items())


def logits(policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.model.eval()(torch.tensor([[10, 11, 12]])).logits


def test_the_policy_folder_of_a_lora_run_loads_as_adapters_or_merged(adapted):
    """Both know the base by themselves; the adapters go on as they are."""
    (saved,) = checkpoint.list_checkpoints(adapted)
    run_config = config(adapted, *LORA)
    with_adapters = load_policy(run_config.model, path=str(saved.policy))
    merged = load_frozen(run_config.model, path=str(saved.policy))
    torch.testing.assert_close(logits(merged), logits(with_adapters), rtol=1e-5, atol=1e-5)
    names = [name for name, parameter in with_adapters.model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    base = load_policy(config(adapted, f"model.path={adapted.parent / 'base'}").model)
    assert not torch.allclose(logits(merged), logits(base), atol=1e-5)
    with pytest.raises(ConfigError, match=r"model.lora.rank=8: .* holds adapters of rank 4; set that"):
        load_policy(config(adapted, "model.lora.rank=8").model, path=str(saved.policy))


def test_merged_export_of_a_lora_run_is_a_plain_model(adapted, tmp_path):
    from transformers import AutoModelForCausalLM

    result = export(adapted, tmp_path / "out", "--merge-lora")
    assert result.returncode == 0, result.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = load_policy(config(adapted, *LORA).model, path=str(checkpoint.list_checkpoints(adapted)[0].policy))
    with torch.no_grad():
        found = merged(torch.tensor([[10, 11, 12]])).logits
    torch.testing.assert_close(found, logits(expected), rtol=1e-5, atol=1e-5)


def test_export_of_a_damaged_checkpoint_is_refused(trained, tmp_path):
    (saved,) = checkpoint.list_checkpoints(trained)
    copied = shutil.copytree(saved.path, tmp_path / saved.path.name)
    (copied / "parts.json").write_text("{}")
    result = export(copied, tmp_path / "out")
    assert result.returncode == 2
    assert "damaged (parts.json has " in result.stderr


def test_a_checkpoint_of_another_version_is_named_and_passed_over(trained, tmp_path, caplog):
    shutil.copytree(trained, tmp_path / "run")
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run")
    manifest = saved.manifest
    del manifest["version"]
    (saved.path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.newest_intact(tmp_path / "run") is None
    assert "manifest.json: version None, this code reads 2" in caplog.text


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    """Enough for the moments, not for what is exported beside them."""
    free = collections.namedtuple("Usage", "free")(free=300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(checkpoint.CheckpointError, match=r"rank 0: 0.000 GiB free, a checkpoint takes 0.000 GiB"):
        trainer.fit(config(tmp_path / "run", "steps=1", "evaluation.every_steps=0"))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_read_only_folder_is_one_line(capsys):
    with pytest.raises(SystemExit, match="1"), cli.errors_in_one_line():
        raise OSError(errno.EROFS, "Read-only file system", "/runs/x/metrics.tmp")
    message = "error: /runs/x/metrics.tmp: Read-only file system; free space or mend the folder, then run the same"
    assert capsys.readouterr().err.startswith(message)
    with pytest.raises(FileNotFoundError), cli.errors_in_one_line():
        raise FileNotFoundError(errno.ENOENT, "No such file", "/x")


def test_another_stage_resumes_and_says_that_sums_change(tmp_path, caplog):
    quiet = ["evaluation.every_steps=0", "optimizer.learning_rate=1e-4"]
    trainer.fit(config(tmp_path / "unbroken", *quiet))
    trainer.fit(config(tmp_path / "run", *quiet, "steps=2"))
    trainer.fit(config(tmp_path / "run", *quiet, "deepspeed.zero_stage=2"))
    assert "resumed with another layout (deepspeed.zero_stage: 0 -> 2); equal to rounding" in caplog.text
    for line, expected in zip(metrics(tmp_path / "run"), metrics(tmp_path / "unbroken"), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_zero_3_loads_policy_and_reference_in_parts(adapted, tmp_path):
    """``from_pretrained`` leaves no weight whole, and the run is that of stage 0."""
    shared = [f"model.path={adapted.parent / 'base'}", "loss.kl_coef=0.1", "steps=2", "evaluation.every_steps=0"]
    sharded = ["deepspeed.zero_stage=3", "+deepspeed.extra.zero_optimization.stage3_param_persistence_threshold=0"]
    zero3 = config(tmp_path / "3", *shared, *sharded)
    dist.setup(deadline_s=60)
    with sharded_loading(zero3.deepspeed, dtype="float32"):
        parameters = list(load_policy(zero3.model).model.parameters())
    assert sum(parameter.numel() for parameter in parameters) == 0
    assert sum(parameter.ds_tensor.ds_numel for parameter in parameters) == sum(p.ds_numel for p in parameters) > 0
    trainer.fit(config(tmp_path / "0", *shared))
    trainer.fit(zero3)
    for line, expected in zip(metrics(tmp_path / "3"), metrics(tmp_path / "0"), strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_zero_matrix_and_moves_between_its_layouts():
    """ZeRO 0 and 3 on one and two ranks, and each resumed as the next: losses and weights to 1e-5."""
    script = ROOT / "scripts" / "soak" / "zero_matrix.py"
    command = [sys.executable, str(script), "--stages", "0", "3", "--dtypes", "float32"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 8
    assert all(max(row["loss"], row["weight"]) <= 1e-5 for row in rows)
    by_run = {row["run"]: row for row in rows}
    one, two = (by_run[f"float32, ZeRO 3, {count}"] for count in ("1 rank", "2 ranks"))
    for kind in ("optimiser", "parameters"):
        assert one[kind][0] == pytest.approx(two[kind][0] + two[kind][1], rel=0.01)
        assert two[kind][0] == two[kind][1]


def test_an_old_fashioned_adapter_folder_names_its_base(adapted, tmp_path):
    """Adapters that peft saved, without our file: the base is the path in their config."""
    (saved,) = checkpoint.list_checkpoints(adapted)
    folder = shutil.copytree(saved.policy, tmp_path / "adapters")
    (folder / "base_model.json").unlink()
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(adapted.parent / "base")
    ours = load_frozen(config(adapted, *LORA).model, path=str(saved.policy))
    assert torch.equal(logits(load_frozen(config(adapted, *LORA).model, path=str(folder))), logits(ours))
