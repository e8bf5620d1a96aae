"""Host memory of each rank while it loads a model of 200 million random fp32 weights (Linux).

python scripts/bench/loading.py [--ranks 2] [--layers 12] [--gguf FILE]

Printed: the most that a rank's anonymous memory (its own pages) and its mapped files (pages of the weights' files,
which ranks share and which the kernel may drop) grow while ``load_policy`` runs, in MiB, and the first as a multiple of
the loaded weights. Loaded to "meta" the weights lie nowhere, as on a GPU they lie elsewhere: what is left is what
loading needs beside them. ``--gguf`` adds a GGUF file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
# Precision, ZeRO stage, and the device that is loaded to.
CASES = {
    "fp32": ("float32", 0, "cpu"),
    "bf16": ("bfloat16", 0, "cpu"),
    "bf16, ZeRO 3": ("bfloat16", 3, "cpu"),
    "fp32, elsewhere": ("float32", 0, "meta"),
    "bf16, elsewhere": ("bfloat16", 0, "meta"),
}


def resident() -> tuple[int, int]:
    """Bytes of anonymous pages and of mapped files of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024, int(lines["RssFile"].split()[0]) * 1024


class Peaks:
    """The most of both while a block runs, every 2 ms."""

    def __enter__(self) -> Peaks:
        self.before = self.most = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.most = tuple(map(max, self.most, resident()))  # type: ignore[assignment]

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.most = tuple(map(max, self.most, resident()))  # type: ignore[assignment]


def rank_main(folder: str, source: str, dtype: str, stage: int, device: str) -> None:
    """In a rank: load, and print the peaks."""
    import deepspeed  # noqa: F401 - its memory is no part of the question
    from transformers import AutoModelForCausalLM  # noqa: F401

    from rltrain.config import DeepSpeedConfig
    from rltrain.engine.deepspeed import sharded_loading
    from rltrain.engine.zero_shards import full_shape
    from rltrain.policy import from_pretrained
    from rltrain.policy.load import PretrainedConfig, load_policy
    from rltrain.runtime import dist

    if device == "meta":
        from_pretrained.require_finite = lambda *_: None  # there are no numbers to look at
    target = None if device == "cpu" else torch.device(device)

    dist.setup(deadline_s=600, join_s=600)
    load_policy(PretrainedConfig(path=f"{folder}/small", dtype=dtype))
    dist.barrier("start")
    with Peaks() as found, sharded_loading(DeepSpeedConfig(zero_stage=stage), dtype=dtype):
        policy = load_policy(PretrainedConfig(**json.loads(source), dtype=dtype), device=target)
    grown = [most - before for most, before in zip(found.most, found.before, strict=True)]
    weights = sum(full_shape(p).numel() for p in policy.model.parameters()) * policy.model.dtype.itemsize
    made = {"rank": dist.rank(), "weights": weights, "grown": grown}
    Path(folder, f"rank{dist.rank()}.json").write_text(json.dumps(made))
    dist.barrier("end")


def make_models(folder: str, layers: int) -> None:
    """A small and a large model of the built-in kind, as transformers folders."""
    from rltrain.policy.load import load_policy, save_policy
    from rltrain.policy.tiny import TinyConfig

    sizes = {"hidden_size": 1024, "heads": 16, "intermediate_size": 4096}
    save_policy(load_policy(TinyConfig()), Path(folder, "small"))
    save_policy(load_policy(TinyConfig(layers=layers, **sizes)), Path(folder, "large"))


def run_case(folder: str, name: str, source: dict[str, str], case: tuple[str, int, str], ranks: int) -> None:
    """Under torchrun; a line a rank."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    child = [__file__, "--child", folder, json.dumps(source), *map(str, case)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*launcher, *child], env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{name}: {ended.stderr}")
    for rank in range(ranks):
        made = json.loads(Path(folder, f"rank{rank}.json").read_text())
        own, files = made["grown"]
        sizes = f"{made['weights'] / MIB:9.0f}{own / MIB:11.0f}{files / MIB:7.0f}"
        print(f"{name:16s}{rank:5d}{sizes}{own / made['weights']:15.2f}", flush=True)


def main() -> None:
    """Each case, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, source, dtype, stage, device = arguments.child
        return rank_main(folder, source, dtype, int(stage), device)
    print(f"{'case':16s}{'rank':>5s}{'weights':>9s}{'anonymous':>11s}{'files':>7s}{'times weights':>15s}")
    with tempfile.TemporaryDirectory() as folder:
        make_models(folder, arguments.layers)
        for name, case in CASES.items():
            run_case(folder, name, {"path": f"{folder}/large"}, case, arguments.ranks)
        if file := arguments.gguf:
            source = {"path": str(file.parent), "gguf_file": file.name}
            run_case(folder, "GGUF in bf16", source, ("bfloat16", 0, "cpu"), arguments.ranks)
    return None


if __name__ == "__main__":
    main()
