"""A process that joins its group as a run does, on stand-ins for CUDA and NCCL, and waits for its twin.

python start_on_stand_in_gpu.py FOLDER NAME TWIN         the GPUs in sight are those of CUDA_VISIBLE_DEVICES
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as torch_dist

from rltrain.runtime import dist

JOIN = torch_dist.init_process_group


def wait_for(path: Path) -> None:
    end = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


def main(folder: Path, name: str, twin: str) -> None:
    visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: len(visible)
    torch.cuda.get_device_name = lambda device: f"GPU {visible[device.index]}"
    torch.cuda.set_device = lambda device: None
    torch_dist.init_process_group = lambda backend, **options: JOIN("gloo", **options)
    (folder / f"{name}.ready").touch()
    wait_for(folder / f"{twin}.ready")
    dist.setup(deadline_s=60.0)
    (folder / f"{name}.joined").touch()
    wait_for(folder / f"{twin}.joined")  # both groups exist at the same time
    print(dist.device_in_words(), dist.world_size())
    dist.teardown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
