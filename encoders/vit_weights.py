"""Weights of a timm ViT for other parts than itself: other patch sizes, and stacks of ours that begin as its blocks."""

from __future__ import annotations

import timm
from timm.layers import resample_patch_embed
from torch import Tensor, nn


def resample_patches(weight: Tensor, side: int) -> Tensor:
    """Patch projection [D, C, n, n] -> that of patches of another side, [D, C, side, side].

    A picture that grows with its patches has the same tokens; of one that shrinks they are the nearest there are
    (Beyer et al. 2023, FlexiViT, section 3.4).
    """
    return resample_patch_embed(weight, [side, side])


def rename_vit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename blocks and last norm of a timm ViT to those of our own stacks (``blocks.N.*``, ``final_norm.*``).

    Its fused qkv is split.
    """
    names = {
        "norm1": "attention_norm",
        "norm2": "feed_norm",
        "attn.proj": "attention.out",
        "mlp.fc1": "feed.up",
        "mlp.fc2": "feed.down",
    }
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("norm."):
            renamed[f"final_{name}"] = tensor
        if not name.startswith("blocks."):
            continue
        _, number, rest = name.split(".", 2)
        layer, kind = rest.rsplit(".", 1)
        if layer == "attn.qkv":
            for ours, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"blocks.{number}.attention.{ours}.{kind}"] = part
        elif layer in names:
            renamed[f"blocks.{number}.{names[layer]}.{kind}"] = tensor
    return renamed


def load_vit(module: nn.Module, model: str) -> None:
    """Fill ``module.blocks`` and ``module.final_norm`` from a pretrained timm ViT (ViLT, section 3.1).

    Raises:
        ValueError: the ViT has too few blocks or other sizes.
    """
    theirs = rename_vit(timm.create_model(model, pretrained=True, num_classes=0).state_dict())
    wanted = {}
    for name, tensor in module.state_dict().items():
        if not name.startswith(("blocks.", "final_norm.")) or ".cross" in name:
            continue
        if name not in theirs or theirs[name].shape != tensor.shape:
            raise ValueError(
                f"init timm:{model} has no {name} of shape {tuple(tensor.shape)}; use a ViT of these sizes"
            )
        wanted[name] = theirs[name]
    module.load_state_dict(wanted, strict=False)
