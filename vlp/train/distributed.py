"""One process or many: what torchrun set up, and which device this rank has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def pick_device(wanted: str | None = None) -> torch.device:
    """Return the device of this rank: ``wanted``, else its accelerator, else the CPU.

    Raises:
        ValueError: the wanted device is not there.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = torch.device("cpu") if found is None else torch.device(found.type, local if found.type == "cuda" else None)
    else:
        device = torch.device(wanted)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {wanted}: no CUDA device is available here; use cpu")
        torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the ranks that torchrun started, if any, for the time of the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
