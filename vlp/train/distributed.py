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
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = torch.device(wanted) if wanted is not None else here or torch.device("cpu")
    except RuntimeError:
        raise ValueError(f"device {wanted}: torch knows no such device; use cpu, cuda or cuda:0") from None
    if device.type == "cpu":
        return device
    if here is None or device.type != here.type:
        raise ValueError(f"device {wanted}: there is none here; use {'cpu' if here is None else f'{here.type} or cpu'}")
    if device.index is None and device.type == "cuda":
        device = torch.device("cuda", local)
    if (device.index or 0) >= torch.accelerator.device_count():
        raise ValueError(
            f"device {device}: only {torch.accelerator.device_count()} are here; start fewer processes or use cpu"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the ranks that torchrun started, if any, for the time of the block.

    An error leaves the group as it is: leaving takes all ranks, and the others may be waiting in a collective, so that
    this one would wait for them, and its error would not be seen. Its process ends instead, and torchrun ends theirs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield
    dist.destroy_process_group()
