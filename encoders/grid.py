"""`grid`: the feature map of any timm CNN or Swin. Pixels -> one token a cell.

Shapes: B batch, C channels, h x w cells, N tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import timm
import torch
from pydantic import Field
from timm.models import load_checkpoint
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torchvision.ops import roi_align

from encoders.dictionary import Dictionary, DictionaryConfig
from encoders.positions import sine_positions
from encoders.sources import local_source
from encoders.types import Images, Tokens
from vlp.config import Config

FROZEN_AT_A_TIME = 64
"""Images that a frozen body runs at a time: large activations are slow to allocate on a CPU, by a factor of three."""


class GridConfig(Config):
    """A timm model without its classifier, as it is."""

    kind: Literal["grid"] = "grid"
    model: str = "resnet50"
    """timm model name (`timm.list_models("resnet*")`)."""
    pretrained: bool = False
    """Start from timm's weights of that name."""
    weights: str | None = None
    """File of a state dict to start from instead, or `package:NAME/path` of one in an installed package; its tensors
    may have another project's names if they are of the same number, order and shapes."""
    image_size: int = 224
    """Side of the square input in pixels."""
    reduction: int | None = None
    """Pixels along a side of a cell: later stages of the model are left out (OFA 16); none = none are."""
    head_conv: bool = True
    """Keep the 1x1 convolution that an EfficientNet has behind its last stage (ALIGN: off)."""
    sample: int | None = Field(None, ge=1)
    """Cells that training keeps of each image, drawn anew each time; all are read afterwards (Pixel-BERT: 100)."""
    max_pool: bool = False
    """Keep the largest value of every 2 x 2 cells (Pixel-BERT, SOHO)."""
    dictionary: DictionaryConfig | None = None
    """Read each cell as the nearest entry of a learned dictionary (SOHO)."""
    positions: Literal["none", "sine"] = "none"
    """What says where a cell is: nothing but what convolutions see of the border, or added sines and cosines of its row
    and column (SOHO)."""
    tokens: Literal["cells", "boxes"] = "cells"
    """What an image's tokens are: the map's cells, or what is pooled of the whole map and then of each box that texts
    name, where the batch has such (`Images.boxes`: B2T2)."""
    box_cells: int = Field(7, ge=1)
    """Rows and columns of points that a box is read at, between cells, before their mean is taken."""
    mean_token: bool = False
    """Put the mean of all cells before them, as a [CLS] (X-VLM's Swin)."""
    freeze_norm: bool = True
    """Batch norms keep their statistics and weights: at a fusion's batch sizes they would drift."""
    mean: tuple[float, float, float] | None = None
    """Channel means of pixels in 0..1; None = the model's own."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations; None = the model's own."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of timm.create_model."""

    def build(self) -> GridEncoder:
        """Build the encoder with random weights."""
        return GridEncoder(self)


class GridEncoder(nn.Module):
    """Images -> tokens of a feature map; `pooled` is what timm's classifier would read.

    Raises:
        ValueError: timm does not know the model, or its features are no map.
    """

    mean: Tensor
    std: Tensor
    bare = False

    def __init__(self, config: GridConfig) -> None:
        super().__init__()
        # Channels last is how convolutions run fastest, on CPU and GPU. timm's attributes are untyped.
        self.body: Any = _create(config, pretrained=False).to(memory_format=torch.channels_last)
        if config.reduction is not None:
            _end_at(self.body, config)
        if not config.head_conv:
            _drop_head_conv(self.body, config.model)
        native = self.body.pretrained_cfg
        self.config = config.model_copy(
            update={"mean": config.mean or tuple(native["mean"]), "std": config.std or tuple(native["std"])}
        )
        self.width: int = self.body.num_features
        cells = config.sample or config.dictionary or config.positions != "none" or config.mean_token
        if config.tokens == "boxes" and cells:
            raise ValueError(
                "model.vision.tokens boxes has no cells, which sample, dictionary, positions and mean_token are of; "
                "leave these out, or use tokens cells"
            )
        self.dictionary: Dictionary | None = None
        if config.dictionary is not None:
            self.dictionary, self.width = Dictionary(config.dictionary, self.width), config.dictionary.width
        self.register_buffer("mean", torch.tensor(self.config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.config.std).view(1, 3, 1, 1), persistent=False)
        self._freeze_norm()

    @property
    def hideable(self) -> tuple[int, int] | None:
        """K, entries that may be hidden, and P, cells of an image of ``image_size``; None if there are none to hide."""
        own = self.dictionary
        return None if own is None or own.mask is None else (own.config.entries, math.prod(self._map_size()))

    @property
    def whole_grid(self) -> tuple[int, int] | None:
        """Rows and columns of the cells that every image gives; None where training draws a part of them."""
        return self._map_size() if self.config.sample is None else None

    def _map_size(self) -> tuple[int, int]:
        """Rows and columns of the map of an image of ``image_size``, by a forward of shapes alone."""
        mapped, side = _Mapped(self), self.config.image_size
        weights = {
            name: tensor.detach().to("meta") for name, tensor in (*mapped.named_parameters(), *mapped.named_buffers())
        }
        found = functional_call(mapped, weights, (torch.zeros(1, 3, side, side, device="meta"),))
        rows, columns = found.shape[1:3] if self._channels_last(found) else found.shape[2:4]
        return rows, columns

    def load_pretrained(self) -> None:
        """Fill the weights from timm's or from the file that the recipe names.

        Raises:
            ValueError: the file cannot be read or does not fit.
        """
        if self.config.weights is not None:
            path = local_source(self.config.weights)
            try:
                load_checkpoint(self.body, path, strict=False, remap=True, weights_only=True)
            except (OSError, RuntimeError, AssertionError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"model.vision.weights {self.config.weights}: {reason}") from error
        elif self.config.pretrained:
            theirs = _create(self.config, pretrained=True).state_dict()
            self.body.load_state_dict({name: theirs[name] for name in self.body.state_dict()})

    def train(self, mode: bool = True) -> GridEncoder:
        """As any module; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        self._freeze_norm()
        return self

    def _freeze_norm(self) -> None:
        if not self.config.freeze_norm:
            return
        for part in self.body.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval().requires_grad_(False)

    def forward(self, images: Images, layers: bool = False) -> Tokens:
        """Images -> Tokens, states [B, N, D]; with ``layers`` also the cells of every stage."""
        if images.owner is not None:
            return self.regions(images)[0]
        found, every = self._map(images.pixels, layers)
        if self.config.tokens == "boxes":
            return self._boxes(found, images.boxes, every)
        cells, labels = self._cells(found, images.masked)
        pooled = self._pool(found, cells)
        cells, labels = self._sampled(cells, labels)
        if self.config.mean_token:
            cells = torch.cat([cells.mean(1, keepdim=True), cells], 1)
            labels = None if labels is None else F.pad(labels, (1, 0), value=-100)
        return Tokens(cells, None, pooled, every, labels)

    def _boxes(self, found: Tensor, boxes: Tensor | None, every: tuple[Tensor, ...] | None) -> Tokens:
        """The whole map's vector, and those of boxes [B, R, 4] -> Tokens, states [B, 1 + R, C]."""
        whole = self.body.forward_head(found, pre_logits=True)
        states, keep = whole[:, None], None
        if boxes is not None:
            found = found.movedim(-1, 1) if self._channels_last(found) else found
            states = torch.cat([states, pooled_boxes(found, boxes, self.config.box_cells)], 1)
            keep = F.pad((boxes[..., 2:] > boxes[..., :2]).all(-1), (1, 0), value=True)
        return Tokens(states, keep, whole, every)

    def _sampled(self, cells: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """In training, each image's share of its cells [B, N, D], in their order (Huang et al. 2020, section 3.3)."""
        number = self.config.sample
        if not self.training or number is None or number >= cells.shape[1]:
            return cells, labels
        drawn = torch.rand(cells.shape[:2], device=cells.device).topk(number, 1).indices.sort(1).values
        part = cells.gather(1, drawn[..., None].expand(-1, -1, cells.shape[2]))
        return part, None if labels is None else labels.gather(1, drawn)

    def regions(self, images: Images) -> tuple[Tokens, Tokens]:
        """Regions of pictures -> Tokens of the regions [B, N, D], and of the pictures themselves [pixels, N, D].

        A region has its picture's cells, of which it keeps its own; the mean is of these (Zeng et al. 2022, X-VLM).
        """
        assert images.owner is not None
        found, _ = self._map(images.pixels, layers=False)
        cells, _ = self._cells(found)
        whole = Tokens(cells, None, self._pool(found, cells))
        own = cells.index_select(0, images.owner)
        keep = own.new_ones(own.shape[:2], dtype=torch.bool) if images.keep is None else images.keep
        weight = keep[..., None].to(own.dtype)
        pooled = (own * weight).sum(1) / weight.sum(1).clamp(min=1)
        if self.config.mean_token:
            own, keep = torch.cat([pooled[:, None], own], 1), torch.cat([keep.new_ones(len(keep), 1), keep], 1)
            whole = Tokens(torch.cat([cells.mean(1, keepdim=True), cells], 1), None, whole.pooled)
        return Tokens(own, keep, pooled), whole

    def _map(self, pixels: Tensor, layers: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Pixels -> the body's feature map, and the cells of every stage."""
        if not pixels.is_floating_point():
            pixels = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if not layers:
            return self._pooled(self._features(pixels)), None
        found, stages = self.body.forward_intermediates(pixels, output_fmt="NCHW")
        return self._pooled(found), tuple(stage.flatten(2).transpose(1, 2) for stage in stages)

    def _features(self, pixels: Tensor) -> Tensor:
        """The last stage's map. A frozen body keeps nothing for a backward, so a few images at a time cost nothing."""
        if any(weight.requires_grad for weight in self.body.parameters()):
            return self.body.forward_features(pixels)
        return torch.cat([self.body.forward_features(part) for part in pixels.split(FROZEN_AT_A_TIME)])

    def _pooled(self, found: Tensor) -> Tensor:
        """The map with the largest value of every 2 x 2 cells, where the recipe asks for it."""
        if not self.config.max_pool:
            return found
        last = self._channels_last(found)
        pooled = F.max_pool2d(found.movedim(-1, 1) if last else found, 2, ceil_mode=True)
        return pooled.movedim(1, -1) if last else pooled

    def _cells(self, found: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The map's cells, or their entries, [B, N, D]; of hidden ones also which entries they are, [B, N]."""
        last, labels = self._channels_last(found), None
        cells = found.flatten(1, 2) if last else found.flatten(2).transpose(1, 2)
        if masked is not None and (self.dictionary is None or masked.shape[1] != cells.shape[1]):
            raise ValueError(
                f"images hide some of {masked.shape[1]} cells, but model.vision.kind grid has {cells.shape[1]} and can "
                "hide them only with a dictionary; set model.vision.dictionary, and give images of image_size"
            )
        if self.dictionary is not None:
            cells, labels = self.dictionary(cells, masked)
        if self.config.positions == "sine":
            rows, columns = found.shape[1:3] if last else found.shape[2:4]
            cells = cells + sine_positions((rows, columns), cells.shape[2], cells.device).to(cells.dtype)
        return cells, labels

    def _pool(self, found: Tensor, cells: Tensor) -> Tensor:
        """What timm's classifier would read of the map; of a dictionary, or of early stages, the mean of the cells."""
        if self.dictionary is None and self.config.reduction is None:
            return self.body.forward_head(found, pre_logits=True)
        return cells.mean(1)

    def _channels_last(self, found: Tensor) -> bool:
        """Whether the map is [B, h, w, C] (Swin), as timm says by ``output_fmt``."""
        return getattr(self.body, "output_fmt", "NCHW") == "NHWC"


def pooled_boxes(found: Tensor, boxes: Tensor, points: int) -> Tensor:
    """Mean of a map [B, C, h, w] at points x points places in boxes [B, R, 4], between cells -> [B, R, C]."""
    rows, columns = found.shape[2:]
    number = torch.arange(len(boxes), device=boxes.device)[:, None, None].expand(-1, boxes.shape[1], 1)
    across, down = boxes[..., ::2] * columns, boxes[..., 1::2] * rows
    placed = torch.cat([number, torch.stack([across, down], -1).flatten(2)], -1).flatten(0, 1)
    # In float32: places within a cell are beyond half precision.
    read = roi_align(found.float(), placed.float(), points, sampling_ratio=1, aligned=True)
    return read.mean((2, 3)).unflatten(0, boxes.shape[:2]).to(found.dtype)


class _Mapped(nn.Module):
    """Pixels to an encoder's map, as a module of its own."""

    def __init__(self, encoder: GridEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder._map(pixels, layers=False)[0]


def _reductions(body: Any) -> list[int]:
    """Pixels along a side of a cell after each of a timm model's stages."""
    return [stage["reduction"] for stage in body.feature_info]


def _end_at(body: Any, config: GridConfig) -> None:
    """Leave out the stages behind the last one whose cells have ``config.reduction`` pixels along a side."""
    sizes = _reductions(body)
    if config.reduction not in sizes or not hasattr(body, "prune_intermediate_layers"):
        raise ValueError(
            f"model.vision.reduction {config.reduction}: {config.model} has no such stage to end with; it has {sizes}"
        )
    last = len(sizes) - 1 - sizes[::-1].index(config.reduction)
    body.prune_intermediate_layers([last], prune_norm=True)
    body.num_features = body.feature_info[last]["num_chs"]


def _drop_head_conv(body: Any, name: str) -> None:
    conv = getattr(body, "conv_head", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(body, "bn2"):
        raise ValueError(
            f"model.vision.head_conv false: {name} has no such convolution, as EfficientNets do; set it true"
        )
    body.conv_head, body.bn2, body.num_features = nn.Identity(), nn.Identity(), conv.in_channels


def _create(config: GridConfig, pretrained: bool) -> Any:
    try:
        return timm.create_model(config.model, pretrained=pretrained, num_classes=0, **config.arguments)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(f"model.vision.model: timm cannot build {config.model!r}: {error}") from error
