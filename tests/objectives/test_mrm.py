"""Noise contrast of regions: as exact under autocast as without it, and in little memory."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from objectives.mrm import region_terms


def features(number: int, width: int) -> torch.Tensor:
    """As a detector gives them: not negative, and most of them small."""
    return torch.randn(number, width, generator=torch.Generator().manual_seed(0)).relu()


def test_autocast_changes_no_candidate():
    """Scores are some hundreds, of which bf16 keeps steps of one or two; the true one was not rounded beside them."""
    candidates = features(12, 512)
    outputs = candidates[:3] + 0.1
    wanted = region_terms("nce", outputs, candidates[:3], candidates)
    with torch.autocast("cpu", torch.bfloat16):
        found = region_terms("nce", outputs, candidates[:3], candidates)
    assert torch.equal(found, wanted)


def test_no_tensor_has_every_value_of_every_pair():
    """Of 64 images with 36 regions of 2,048 values that would be 1.6 GB in bool alone."""
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes.extend(one.numel() for one in (made if isinstance(made, tuple | list) else [made]))
            return made

    candidates = features(40, 512)
    with Sizes():
        region_terms("nce", candidates[:10] + 0.1, candidates[:10], candidates)
    assert max(sizes) < 10 * 40 * 512 / 4
