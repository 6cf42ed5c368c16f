"""Where autocast would lose what a computation is about."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full_precision(of: Tensor) -> AbstractContextManager[Any]:
    """Turn autocast off on a tensor's device, where there is any (not on meta)."""
    device = of.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def finest(device: torch.device) -> torch.dtype:
    """Return the finest kind of numbers that a device has: Apple's GPUs (mps) know no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
