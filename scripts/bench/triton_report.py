"""Compile the Triton kernels for GPUs that are not there, and report what ptxas made of them.

    python scripts/bench/triton_report.py

One row per kernel, type, options and architecture: registers and spilled bytes per thread, shared memory per program.
Exits 1 if anything spills, because a spilling kernel is slow wherever it runs. Needs triton, no GPU; TRITON_INTERPRET
must not be set.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rltrain.kernels import triton as kernels
from rltrain.kernels.head import MASKED

ARCHITECTURES = (80, 90)
POINTERS_OF_STATISTICS = re.compile(
    r"(max|sum|moment|squares|target|logprob|entropy|collision|bias)_(in|out)|grad|entropy_grad"
)
POINTERS_OF_WEIGHTS = {"hidden", "weight", "bias", "dlogits_out"}
MULTIPLES = {"D", "hidden_stride", "weight_stride"}
FLOATS = {"softcap", "scale"}


def signature(kernel: triton.JITFunction, dtype: str, constants: dict[str, object]) -> dict[str, str]:
    """Triton's type of each argument of a kernel."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in POINTERS_OF_WEIGHTS:
            return f"*{dtype}"
        if POINTERS_OF_STATISTICS.fullmatch(name):
            return "*fp32"
        if name == "targets":
            return "*i64"
        return "fp32" if name in FLOATS else "i32"

    return {name: kind(name) for name in kernel.arg_names}


def configurations() -> Iterator[tuple[str, triton.JITFunction, str, dict[str, object], dict[str, int]]]:
    """(label, kernel, type, constants, launch options) of everything that ships."""
    for (dtype, name), entropy, extras in itertools.product(
        ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")), (False, True), (False, True)
    ):
        tiles = kernels.Tiles.of(dtype)
        constants: dict[str, object] = {
            "HAS_BIAS": extras, "HAS_CAP": extras, "ENTROPY": entropy, "MASKED": MASKED,
            "BLOCK_N": tiles.N, "BLOCK_V": tiles.V, "BLOCK_D": tiles.D,
        }  # fmt: skip
        launch = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        label = ("entropy " if entropy else "") + ("bias softcap" if extras else "")
        unit_strides = {"hidden_unit": 1, "weight_unit": 1}
        for collision in (False, True):
            forward = constants | unit_strides | {"COLLISION": collision}
            yield label + (" collision" if collision else ""), kernels.forward_kernel, name, forward, launch
        yield label, kernels.dlogits_kernel, name, constants | unit_strides | {"BIAS_GRAD": extras}, launch
    for entropy, collision in itertools.product((False, True), (False, True)):
        constants = {"ENTROPY": entropy, "COLLISION": collision, "BLOCK_N": kernels.MERGE_ROWS}
        yield (
            ("entropy" if entropy else "") + (" collision" if collision else ""),
            kernels.merge_kernel,
            "fp32",
            constants,
            {},
        )


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack (spills) and static shared memory, as cuobjdump reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main() -> int:
    """Print the table; 1 if a kernel spills."""
    spilled = 0
    print("| sm | kernel | type | options | registers | spilled bytes | shared bytes |\n|---|---|---|---|---|---|---|")
    for architecture, (label, kernel, dtype, constants, launch) in itertools.product(ARCHITECTURES, configurations()):
        # As a launch specialises: pointers, and the hidden sizes of real models, are multiples of 16.
        types = signature(kernel, dtype, constants)
        multiples = [i for i, (name, kind) in enumerate(types.items()) if kind.startswith("*") or name in MULTIPLES]
        aligned = {(i,): [["tt.divisibility", 16]] for i in multiples}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)
        usage = resources(compiled.asm["cubin"])
        spill = usage["STACK"] + usage["LOCAL"]
        spilled += spill
        row = (architecture, kernel.__name__, dtype, label, usage["REG"], spill, compiled.metadata.shared)
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
