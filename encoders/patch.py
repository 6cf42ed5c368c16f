"""`patch`: any timm ViT. Pixels -> patch tokens.

Shapes: B batch, P patches, N tokens (prefix tokens and patches), D width.
"""

from __future__ import annotations

import logging
import threading
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import timm
import torch
from pydantic import Field
from timm.layers import HybridEmbed, LayerNorm, PatchEmbed
from torch import Tensor, nn

from encoders.positions import PositionResize, positions_per_image
from encoders.queries import Queries, QueriesConfig
from encoders.types import Images, Tokens
from vlp.config import Config

logger = logging.getLogger(__name__)

_HOOKS = threading.RLock()
"""Held while hooks hang in a ViT: they are the module's, and threads that serve one model would get each other's."""


class PatchConfig(Config):
    """A timm ViT, as it is or resized; ``depth: 0`` is the bare patch embedding of ViLT."""

    kind: Literal["patch"] = "patch"
    model: str = "vit_base_patch16_224"
    """timm model name (`timm.list_models("*vit*")`)."""
    pretrained: bool = False
    """Start from timm's weights of that name (resized to the sizes below)."""
    image_size: int = 224
    """Side of the square input in pixels."""
    patch_size: int | None = None
    """Side of a patch in pixels; None = the model's own."""
    width: int | None = None
    """Token width; None = the model's own."""
    depth: int | None = None
    """Transformer blocks; None = the model's own, 0 = patch embedding with positions only."""
    heads: int | None = None
    """Attention heads; None = the model's own."""
    stem: tuple[int, ...] = ()
    """Channels of strided 3x3 convolutions before the patches; each halves the side, `patch_size` counts after them."""
    hybrid: str | None = None
    """timm CNN whose stages down to a sixteenth of the side come before the patches; `patch_size` counts in its cells
    (SimVLM: resnet101)."""
    eps: float | None = None
    """Epsilon of the layer norms; None = the model's own (1e-6; CLIP's 1e-5)."""
    class_token: bool = True
    """Keep the class token; without it `pooled` is the mean of the patches."""
    pool: Literal["class", "tanh", "mean", "map"] | None = None
    """`pooled`: the class token, that through a dense layer and tanh (BERT's pooler), the mean of the patches, or what
    one learned query attends to (SigLIP); None = the class token where there is one, else the mean."""
    position_resize: PositionResize = "bicubic_antialias"
    """How stored position embeddings become those of another `image_size` when weights are loaded."""
    position_size: int | None = None
    """Side in pixels of the square that the position embeddings are of, where images keep their aspect ratio: they are
    interpolated for each image's own rows and columns of patches, antialiased if `position_resize` is
    bilinear_antialias (SigLIP 2), else with the corners in place (ViLT). None = `image_size`, and no interpolation."""
    drop_path: float = 0.0
    """Stochastic depth rate."""
    patch_drop: float = Field(0.0, ge=0, lt=1)
    """Share of the patches that training leaves out, drawn anew for each image; all are read afterwards (FLIP 0.5)."""
    queries: QueriesConfig | None = None
    """Learned queries that pool the tokens, and whose findings take their place (CoCa)."""
    mask_token: bool = False
    """Learn a token that stands for masked patches (masked image modelling)."""
    region_depth: int | None = None
    """Blocks at the top that see only a region's patches, where images are regions of pictures (X-VLM: 4); None = all
    blocks."""
    mean: tuple[float, float, float] | None = None
    """Channel means of pixels in 0..1; None = the model's own."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations; None = the model's own."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of timm.create_model."""

    def build(self) -> PatchEncoder:
        """Build the encoder with random weights."""
        return PatchEncoder(self)


class ConvStem(nn.Module):
    """Strided 3x3 convolutions (Xiao et al. 2021, "Early convolutions help transformers see better")."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *channels[:-1]), channels, strict=True):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.GroupNorm(1, after), nn.GELU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, channels[-1], H / 2^n, W / 2^n]."""
        return self.layers(pixels)


class PatchEncoder(nn.Module):
    """Images -> tokens of a timm ViT.

    Raises:
        ValueError: timm does not know the model, or the sizes do not fit each other.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        self.vit: Any = _create(config, pretrained=False)  # timm's attributes are untyped
        native = self.vit.pretrained_cfg
        self.config = config.model_copy(
            update={"mean": config.mean or tuple(native["mean"]), "std": config.std or tuple(native["std"])}
        )
        self.width: int = self.vit.embed_dim
        self.queries: Queries | None = None
        if config.queries is not None:
            self.queries, self.width = Queries(config.queries, self.width), config.queries.width
        self.bare = config.depth == 0
        cut = 0 if config.stem or config.hybrid or config.position_size else config.image_size % self.patch_side
        if cut:
            logger.warning(
                "model.vision.image_size %d is no multiple of its patches' side %d: the last %d rows and columns of "
                "pixels are not seen",
                *(config.image_size, self.patch_side, cut),
            )
        if config.position_size is not None and (config.stem or config.patch_drop):
            raise ValueError(
                f"model.vision.position_size {config.position_size} needs all patches of the image itself; set it to "
                "none, or model.vision.stem to [] and patch_drop to 0"
            )
        self.register_buffer("mean", _channels(self.config.mean), persistent=False)
        self.register_buffer("std", _channels(self.config.std), persistent=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.vit.embed_dim)) if config.mask_token else None
        self.pooler = nn.Linear(self.width, self.width) if config.pool == "tanh" else None

    @property
    def num_tokens(self) -> int:
        """N, tokens of one image."""
        if self.queries is not None:
            return self.queries.num_tokens
        return self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens

    @property
    def patch_side(self) -> int:
        """Side of a patch in pixels."""
        return self.vit.patch_embed.patch_size[0]

    @property
    def num_prefix(self) -> int:
        """Tokens before the first patch: class and register tokens."""
        return self.vit.num_prefix_tokens if self.queries is None else 0

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels, strided convolutions before it included."""
        return self.vit.patch_embed.img_size[0] // self.grid[0]

    @property
    def has_patches(self) -> bool:
        """Whether the last of its tokens are the patches."""
        return self.queries is None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        return self.vit.patch_embed.grid_size

    @property
    def whole_grid(self) -> tuple[int, int] | None:
        """The grid, where every image gives all of it and at most one token before; else None."""
        part = self.config.patch_drop or self.config.position_size or self.num_prefix > 1 or not self.has_patches
        return None if part else self.grid

    @property
    def takes_hooks(self) -> bool:
        """Whether calls may hang hooks into the ViT for their own time: for masked patches, or for regions."""
        return self.mask_token is not None or self.config.region_depth is not None

    def load_pretrained(self) -> None:
        """Fill the weights with timm's, where the recipe asks for them; a shallower model takes the first blocks.

        Raises:
            ValueError: the published model has fewer blocks.
        """
        if not self.config.pretrained:
            return
        theirs = _create(self.config.model_copy(update={"depth": None}), pretrained=True).state_dict()
        ours = self.vit.state_dict()
        if missing := sorted(ours.keys() - theirs.keys()):
            raise ValueError(
                f"model.vision.depth {self.config.depth}: the pretrained {self.config.model!r} has no "
                f"{missing[0]}; lower it or set pretrained false"
            )
        self.vit.load_state_dict({name: theirs[name] for name in ours})

    def forward(self, images: Images, layers: bool = False) -> Tokens:
        """Images -> Tokens, states [B, N, D]; with ``layers`` also what the first block reads and every block's states.

        States of ``layers`` have not been through the final norm; :meth:`finish` applies it. Regions have none.
        """
        if self.training and self.config.patch_drop and any(x is not None for x in (images.keep, images.masked)):
            raise ValueError(
                f"model.vision.patch_drop {self.config.patch_drop} leaves out patches at random, but these images have "
                "padded or masked ones or are regions; set it to 0"
            )
        if images.owner is not None:
            return self.regions(images, whole=False)[0]
        keep = self._keep(images.keep)
        with _HOOKS if layers or images.masked is not None else nullcontext():
            states, every = self._states(images, keep, layers)
        if self.queries is not None:
            states, pooled = self.queries(states, keep)
            return Tokens(states, None, pooled, tuple(every) if layers else None)
        return Tokens(states, keep, self._pool(states, keep), tuple(every) if layers else None)

    def _states(self, images: Images, keep: Tensor | None, layers: bool) -> tuple[Tensor, list[Tensor]]:
        """Images and keep [B, N] -> states [B, N, D], and with ``layers`` those of every layer."""
        pixels = self._normalised(images.pixels)
        # Not every ViT of timm takes a mask (BEiT does not), so none is given where none is needed.
        given: dict[str, Any] = {} if keep is None else {"attn_mask": keep[:, None, None, :]}
        every: list[Tensor] = []
        hooks = []
        if images.masked is not None:
            hooks.append(self.vit.patch_embed.register_forward_hook(partial(self._replace_masked, images.masked)))
        if layers and not self.bare:
            hooks.append(self.vit.blocks[0].register_forward_pre_hook(lambda _, inputs: every.append(inputs[0])))
            hooks += [block.register_forward_hook(lambda _, __, out: every.append(out)) for block in self.vit.blocks]
        try:
            if self.config.position_size is None:
                states = self.vit.forward_features(pixels, **given)
            else:
                states = self._embed_per_image(pixels, images.keep)
                for block in self.vit.blocks:
                    states = block(states, **given)
                states = self.vit.norm(states)
        finally:
            for hook in hooks:
                hook.remove()
        return states, every or [states]

    def regions(self, images: Images, whole: bool = True) -> tuple[Tokens, Tokens]:
        """Regions of pictures -> Tokens of the regions [B, N, D], and of the pictures themselves [pixels, N, D].

        The lower blocks read the pictures alone; from block ``depth - region_depth`` on every region goes on by itself,
        its tokens seeing no others (Zeng et al. 2022, X-VLM, section 3.1). Without ``whole`` the second holds nothing.
        """
        owner, blocks = images.owner, self.vit.blocks
        assert owner is not None
        first = len(blocks) - (len(blocks) if self.config.region_depth is None else self.config.region_depth)
        number = self.num_tokens
        keep = self._keep(images.keep)
        if keep is None:
            keep = owner.new_ones(len(owner), number, dtype=torch.bool)
        seen = torch.cat([keep, keep.new_ones(len(images.pixels), number)]) if whole else keep

        def spread(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states = inputs[0].index_select(0, owner)
            return (torch.cat([states, inputs[0]]) if whole else states,)

        def mask(_: nn.Module, inputs: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return inputs, {**given, "attn_mask": seen[:, None, None, :]}

        with _HOOKS:
            hooks = [blocks[first].register_forward_pre_hook(spread)]
            hooks += [block.register_forward_pre_hook(mask, with_kwargs=True) for block in blocks[first:]]
            try:
                states = self.vit.forward_features(self._normalised(images.pixels))
            finally:
                for hook in hooks:
                    hook.remove()
        parts = states[: len(owner)], states[len(owner) :]
        return Tokens(parts[0], keep, self._pool(parts[0], keep)), Tokens(parts[1], None, self._pool(parts[1], None))

    def _normalised(self, pixels: Tensor) -> Tensor:
        return pixels if pixels.is_floating_point() else (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std

    def finish(self, states: Tensor) -> Tensor:
        """Apply the final norm to a layer's states [B, N, D]."""
        return self.vit.norm(states)

    def _embed_per_image(self, pixels: Tensor, keep: Tensor | None) -> Tensor:
        """[B, 3, H, W] and keep [B, P] -> [B, N, D]: patches with the positions of each image's own grid."""
        grid = pixels.shape[2] // self.patch_side, pixels.shape[3] // self.patch_side
        prefix = self.vit.num_prefix_tokens
        how: Any = "bilinear_antialias" if self.config.position_resize == "bilinear_antialias" else "bilinear_corners"
        positions = positions_per_image(self.vit.pos_embed[0], grid, prefix, keep, how)  # [B or 1, N, D]
        states = self.vit.patch_embed(pixels)
        if prefix:
            states = torch.cat([self.vit.cls_token.expand(len(pixels), -1, -1), states], 1)
        return self.vit.norm_pre(self.vit.pos_drop(states + positions))

    def _keep(self, patches: Tensor | None) -> Tensor | None:
        """[B, P] -> keep [B, N] with the prefix tokens."""
        if patches is None:
            return None
        return torch.cat([patches.new_ones(patches.shape[0], self.vit.num_prefix_tokens), patches], 1)

    def _replace_masked(self, masked: Tensor, module: nn.Module, inputs: Any, patches: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("images have masked patches but model.vision.mask_token is false; set it to true")
        return torch.where(masked[:, :, None], self.mask_token, patches)

    def _pool(self, states: Tensor, keep: Tensor | None) -> Tensor:
        how = self.config.pool or ("class" if self.config.class_token else "mean")
        if how == "map":
            own = 0 if self.vit.pool_include_prefix else self.vit.num_prefix_tokens
            seen = None if keep is None else keep[:, None, None, own:]
            return self.vit.attn_pool(states[:, own:], attn_mask=seen)
        if self.pooler is not None:
            return torch.tanh(self.pooler(states[:, 0]))
        if how == "class":
            return states[:, 0]
        first = self.vit.num_prefix_tokens
        if keep is None:
            return states[:, first:].mean(1)
        weight = keep[:, first:, None].to(states.dtype)
        return (states[:, first:] * weight).sum(1) / weight.sum(1)


def _channels(values: tuple[float, ...] | None) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)


def _cnn(name: str) -> nn.Module:
    """A CNN down to its stage of a sixteenth of the side."""
    try:
        whole: Any = timm.create_model(name, features_only=True)
        return timm.create_model(name, features_only=True, out_indices=(whole.feature_info.reduction().index(16),))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(f"model.vision.hybrid: timm has no CNN {name!r} with such a stage: {error}") from error


def _create(config: PatchConfig, pretrained: bool) -> Any:
    wanted = {
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    arguments: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    arguments |= {"img_size": config.image_size, "drop_path_rate": config.drop_path, "num_classes": 0}
    if config.patch_drop:
        arguments["patch_drop_rate"] = config.patch_drop
    if not config.class_token:
        arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    if config.pool == "map":
        arguments["global_pool"] = "map"
    if config.eps is not None:
        arguments["norm_layer"] = partial(LayerNorm, eps=config.eps)
    if config.depth == 0:
        arguments["final_norm"] = False  # what the fusion reads are embeddings, normalised by its own blocks
    if config.position_size is not None:
        arguments |= {"img_size": config.position_size, "embed_layer": partial(PatchEmbed, strict_img_size=False)}
    if config.stem:
        arguments["embed_layer"] = partial(HybridEmbed, backbone=ConvStem(config.stem))
    if config.hybrid is not None:
        if config.stem:
            raise ValueError(f"model.vision.hybrid {config.hybrid} and stem {config.stem} both come first; set one")
        arguments["embed_layer"] = partial(HybridEmbed, backbone=_cnn(config.hybrid))
    try:
        return timm.create_model(config.model, pretrained=pretrained, **(arguments | config.arguments))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(f"model.vision.model: timm cannot build {config.model!r} with {arguments}: {error}") from error
