"""Reference models of two towers at random sizes, built by transformers and open_clip when a test runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scripts.goldens.base import Case

WORDS = 99


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fill every weight and buffer with noise that shows wrong epsilons, activations and transposes."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * scale

    with torch.no_grad():
        for name, one in model.named_parameters():
            if name.endswith(("logit_scale", "logit_bias", "temperature")):
                one.copy_(one + noise(one, 0.1).abs())
            elif one.dim() < 2:
                one.copy_(noise(one, 0.2) + (1.0 if "weight" in name else 0.0))
            else:
                small = "embed" in name or "conv1" in name
                one.copy_(noise(one, 0.02 if small else one[0].numel() ** -0.5))
        for name, one in model.named_buffers():
            if name.endswith("running_mean"):
                one.copy_(noise(one, 0.1))
            elif name.endswith("running_var"):
                one.copy_(1 + noise(one, 0.2).abs())
    return model.eval()


def texts(rows: int, length: int, *, pad: int, end: int, seed: int = 0, full: bool = False) -> tuple[Tensor, Tensor]:
    """Ids [rows, length] that end with ``end`` and are padded, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS - 2, (rows, length), generator=generator)
    keep = torch.ones_like(ids)
    for row in range(rows):
        last = length - 1 if full else length - 1 - 2 * row
        ids[row, last], ids[row, last + 1 :], keep[row, last + 1 :] = end, pad, 0
    return ids, keep


def write_case(
    folder: Path,
    inputs: dict[str, Tensor],
    outputs: dict[str, Tensor],
    loss: Tensor,
    model: nn.Module,
    notes: Any = None,
) -> Case:
    """Write what a reference was given and gave, and the norms of its gradient, as the goldens are."""
    loss.backward()
    norms = {name: float(one.grad.norm()) for name, one in model.named_parameters() if one.grad is not None}
    free = [name for name in norms if name.endswith(("k_proj.bias", "key.bias"))]  # a shift of all keys changes nothing
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: one.contiguous() for name, one in inputs.items()}, folder / "inputs.safetensors")
    ready = {name: one.detach().contiguous().clone() for name, one in outputs.items()}
    save_file(ready, folder / "outputs.safetensors")
    (folder / "grad_norms.json").write_text(json.dumps(norms))
    meta = {"parameter_coverage": {"shift_invariant": free}, **(notes or {})}
    (folder / "case.json").write_text(json.dumps(meta))
    return Case(folder)
