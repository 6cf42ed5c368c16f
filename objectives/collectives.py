"""What crosses ranks, named by what happens to its gradient. Without a process group every function is the identity.

Shapes: b rows of this rank, N rows of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_no_grad(x: Tensor) -> Tensor:
    """Return the sum of ``x`` over ranks; no gradient."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def gather_no_grad(x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Return the rows of all ranks [N, ...] in rank order; no gradient.

    Args:
        x: [b, ...], this rank's rows.
        sizes: rows of every rank, where they differ; known on the host, so nothing waits for the device.
    """
    if world_size() == 1:
        return x.detach()
    return _gather(x.detach(), sizes)


def gather_grad_to_all(x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Return the rows of all ranks [N, ...]; the gradient of every rank's loss flows back to the rows' own rank."""
    return x if world_size() == 1 else _GatherGradToAll.apply(x, sizes)


def _gather(x: Tensor, sizes: Sequence[int] | None) -> Tensor:
    x = x.contiguous()
    longest = x.shape[0] if sizes is None else max(sizes)
    if x.shape[0] < longest:
        x = torch.cat([x, x.new_zeros(longest - x.shape[0], *x.shape[1:])])
    out = x.new_empty(world_size() * longest, *x.shape[1:])
    # Newer torches warn of the older name, which is all that torch 2.9 has.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x)
    if sizes is None:
        return out
    return torch.cat([out[r * longest : r * longest + n] for r, n in enumerate(sizes)])


class _GatherGradToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int] | None) -> Tensor:
        own = x.shape[0]
        ctx.rows = (
            slice(rank() * own, rank() * own + own)
            if sizes is None
            else slice(sum(sizes[: rank()]), sum(sizes[: rank() + 1]))
        )
        return _gather(x, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)  # gloo has no reduce_scatter for every dtype; the extra traffic is N x E floats
        return total[ctx.rows], None
