"""What the time estimate knows of devices: peaks from the makers' data sheets, and the share of them that is reached.

=======  ==============================================================================================
figure   source
=======  ==============================================================================================
peaks    NVIDIA's data sheets: dense bf16 with fp32 sums, TF32 off for fp32, memory bandwidth
links    a direction of NVLink (H200, H100: 450 GB/s, A100: 300) or of PCIe 4 x16 (32); a port of
         400 or 200 Gbit/s a GPU between nodes
shares   assumptions, stated here and in docs/planner.md, and not measured
=======  ==============================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from rltrain.errors import require_one_of

GB, TERA = 1e9, 1e12
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates a second of one device. ``*_flops`` are peaks; ``*_share`` is what of a peak is reached.

    ``call_s`` is a layer's share of a decoding step that no bandwidth explains: launches, or the dispatches of a CPU.
    """

    name: str
    memory_gib: float
    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    node_link: float
    network: float
    train_share: float = 0.40
    prefill_share: float = 0.50
    bandwidth_share: float = 0.60
    link_share: float = 0.70
    call_s: float = 600e-6
    graph_call_s: float = 25e-6
    decode_flops: float | None = None
    adam_bytes: float = 30.0  # read and written a parameter: gradient, moments, fp32 weight, and the weight in bf16

    def flops(self, dtype_bytes: int) -> float:
        """The peak of matrix products."""
        return self.bf16_flops if dtype_bytes == 2 else self.fp32_flops

    def link(self, nodes: int) -> float:
        """Bytes a second that a rank sends in a collective over ``nodes`` nodes: the slowest link of the ring."""
        return self.link_share * (self.node_link if nodes == 1 else min(self.node_link, self.network))


def _gpu(name: str, gib: float, bf16: float, fp32: float, bandwidth: float, node_link: float, network: float) -> Device:
    return Device(
        name=name, memory_gib=gib, bf16_flops=bf16 * TERA, fp32_flops=fp32 * TERA, bandwidth=bandwidth * GB,
        node_link=node_link * GB, network=network * GB,
    )  # fmt: skip


DEVICES = {
    device.name: device
    for device in (
        _gpu("H200", 139, 989, 67, 4800, 450, 50),
        _gpu("H100", 79, 989, 67, 3350, 450, 50),
        _gpu("A100", 79, 312, 19.5, 2039, 300, 25),
        _gpu("L40S", 44, 362, 91.6, 864, 32, 25),
        _gpu("4090", 23.5, 165, 82.6, 1008, 32, 12.5),
    )
}


def device_of(name: str) -> Device:
    """The row of the table; ``cpu`` is not in it, but measured (:mod:`rltrain.plan.calibration`)."""
    require_one_of((*DEVICES, "cpu"), "device", name)
    return DEVICES[name]
