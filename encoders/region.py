"""`region`: features and boxes of a detector's regions -> tokens.

How they become tokens is what UNITER, ViLBERT, LXMERT, VisualBERT, Oscar and VL-BERT differ in (Bugliarello et al.
2021, "Multimodal pretraining unmasked", section 3).
Shapes: B images, R regions, F feature width, G values of a box, D width, A alignments, K wavelengths.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from encoders.layers import ACTIVATIONS, Activation, initialise
from encoders.text import TextEmbeddings
from encoders.types import Regions, Tokens
from vlp.config import Config


class RegionConfig(Config):
    """Regions that a detector has found before, as arrays; the defaults are UNITER's."""

    kind: Literal["region"] = "region"
    features: int = 2048
    """F, width of the detector's features."""
    boxes: Literal[0, 4, 5, 6, 7] = 7
    """G, values of a box: 4 corners (LXMERT), and area (ViLBERT), or width and height (Oscar), or all three (UNITER).
    0 = boxes are not read (VisualBERT)."""
    width: int = 768
    """D, token width."""
    geometry: Literal["values", "sinusoid", "crossed"] = "values"
    """What is projected of a box: its values; sines and cosines of its centre and sides (VL-BERT; Hu et al. 2018,
    Relation Networks, section 3.2); or `crossed`: the corners, and (bottom - right) x (top - left) in the place of the
    area, as VL-T5's code takes corners in another order than they come in. The last two are computed from 4 corners."""
    wavelengths: int = 256
    """K of `sinusoid`, whose width is then 4 x 2 x K."""
    merge: Literal["sum", "norm_sum", "norm_mean", "concat", "norm_concat"] = "norm_sum"
    """`sum` of the two projections (ViLBERT); `norm_sum`: each normalised first (UNITER); `norm_mean`: the mean of the
    normalised ones (LXMERT); `concat`: one projection of both laid behind each other (Oscar); `norm_concat`: that,
    normalised (VL-BERT)."""
    activation: Activation | None = None
    """Activation of the projection, before it is normalised (VL-BERT: relu)."""
    norm_start: float = 1.0
    """Weight that the norms of projections start with (VL-BERT 0: at first nothing is seen)."""
    input_dropout: float = 0.0
    """Dropout on what is projected (VL-BERT 0.1)."""
    norm: Literal["own", "text", "none"] = "own"
    """Layer norm of the token: its own, the text embeddings' (VisualBERT), or none (LXMERT)."""
    segments: Literal["none", "own", "text"] = "none"
    """Table of a learned vector that says image: none, its own (VisualBERT), or the text's segments (UNITER)."""
    segment_rows: int = 2
    """Rows of its own table."""
    segment: int = 1
    """Row for regions that do not name one."""
    positions: bool = False
    """Add a learned vector, and the text's position embeddings of words that a region is aligned with (VisualBERT)."""
    word: bool = False
    """Add a learned word that says image, and another one in its place where features are hidden (VL-BERT)."""
    pool: Literal["mean", "first"] = "mean"
    """`pooled`: the mean of the tokens, or what is seen in the first region, without what else its token says: the
    whole picture, where `data.whole_region` puts it there (VL-BERT)."""
    mask_embedding: bool = False
    """Add a learned vector to the features that are hidden (UNITER); they are 0 without it."""
    order: bool = False
    """Add to each region the embedding of a word by its place: the first has the last word's, and on backwards
    (VL-T5)."""
    rms: bool = False
    """Norms without mean and bias (VL-T5)."""
    eps: float = 1e-12
    """Epsilon of the norms."""
    dropout: float = 0.0
    """Dropout on the tokens."""
    number: int = 36
    """R, regions of an image: what costs are counted with."""

    @property
    def image_size(self) -> int:
        """There are no pixels, of which it would be the side."""
        raise ValueError(
            "model.vision.kind region reads what a detector found, not pixels; give model.run a batch of Regions, or "
            "use a vision encoder of pixels"
        )

    def build(self) -> RegionEncoder:
        """Build the encoder with random weights."""
        return RegionEncoder(self)


class RegionEncoder(nn.Module):
    """Regions -> tokens; bare embeddings, whose transformer is the fusion.

    Raises:
        ValueError: a geometry that is computed from corners, of boxes that are not read so.
    """

    bare = True

    def __init__(self, config: RegionConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.width
        if config.geometry != "values" and config.boxes != 4:
            raise ValueError(
                f"model.vision.geometry {config.geometry} is of a box's 4 corners, but model.vision.boxes is "
                f"{config.boxes}; set it to 4, or use geometry values"
            )
        self.concat, normed = config.merge in ("concat", "norm_concat"), config.merge.startswith("norm")
        seen = {"values": config.boxes, "sinusoid": 8 * config.wavelengths, "crossed": 5}[config.geometry]
        self.project = nn.Linear(config.features + (seen if self.concat else 0), config.width)
        self.activation = None if config.activation is None else ACTIVATIONS[config.activation]
        self.box = nn.Linear(seen, config.width) if seen and not self.concat else None
        self.project_norm = self._norm() if normed else nn.Identity()
        self.box_norm = self._norm() if normed and self.box is not None else nn.Identity()
        self.norm = self._norm() if config.norm == "own" else nn.Identity()
        self.segment = nn.Embedding(config.segment_rows, config.width) if config.segments == "own" else None
        self.position = nn.Parameter(torch.zeros(config.width)) if config.positions else None
        self.aligned: nn.Embedding | None = None
        self.ordered: nn.Embedding | None = None
        self.word = nn.Embedding(2, config.width) if config.word else None
        self.mask = nn.Parameter(torch.zeros(config.features)) if config.mask_embedding else None
        self.input_drop, self.drop = nn.Dropout(config.input_dropout), nn.Dropout(config.dropout)
        initialise(self)
        for norm in (self.project_norm, self.box_norm):
            if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
                nn.init.constant_(norm.weight, config.norm_start)

    def _norm(self) -> nn.Module:
        return (nn.RMSNorm if self.config.rms else nn.LayerNorm)(self.config.width, self.config.eps)

    @property
    def num_tokens(self) -> int:
        """N, tokens of one image."""
        return self.config.number

    @property
    def feature_projection(self) -> nn.Parameter | None:
        """[D, F], for heads that are tied to it (UNITER); None where boxes are part of it."""
        weight = self.project.weight
        assert isinstance(weight, nn.Parameter)
        return None if self.concat else weight

    def tie(self, text: nn.Module) -> None:
        """Share what the recipe says with the text encoder's embeddings.

        Raises:
            ValueError: the text encoder is another library's, or of another width.
        """
        config = self.config
        if config.norm != "text" and config.segments != "text" and not config.positions and not config.order:
            return
        theirs = getattr(text, "embeddings", None)
        if not isinstance(theirs, TextEmbeddings) or theirs.word.embedding_dim != self.width:
            raise ValueError(
                "model.vision region shares norm, segments, positions or order with the text embeddings, which needs "
                f"model.text.kind text of width {self.width}; use that, or norm own, segments own, positions and order "
                "false"
            )
        if config.norm == "text":
            if not isinstance(theirs.norm, nn.LayerNorm):
                raise ValueError("model.vision.norm text needs model.text.embed_norm true; set it, or use norm own")
            self.norm = theirs.norm
        if config.segments == "text":
            if theirs.segment is None or theirs.segment.num_embeddings <= config.segment:
                raise ValueError(
                    f"model.vision.segments text needs model.text.segments of more than {config.segment}, the row of "
                    "images; raise it, or use segments own"
                )
            self.segment = theirs.segment
        if config.positions:
            if theirs.position is None:
                raise ValueError(
                    "model.vision.positions true needs model.text.absolute_positions true; set it, or positions false"
                )
            self.aligned = theirs.position
        if config.order:
            if theirs.word.num_embeddings < config.number:
                raise ValueError(
                    f"model.vision.order gives each of {config.number} regions a word, but the text has "
                    f"{theirs.word.num_embeddings}; lower model.vision.number"
                )
            self.ordered = theirs.word

    def load_pretrained(self) -> None:
        """There are no published weights of this part alone."""

    def forward(self, regions: Regions, layers: bool = False) -> Tokens:
        """Regions -> Tokens, states [B, R, D].

        Raises:
            ValueError: features or boxes are of another width than the recipe says.
        """
        config = self.config
        boxes = regions.boxes
        if regions.features.shape[-1] != config.features or (config.boxes and boxes.shape[-1] != config.boxes):
            raise ValueError(
                f"regions have features of width {regions.features.shape[-1]} and boxes of {boxes.shape[-1]} values, "
                f"but model.vision.features is {config.features} and model.vision.boxes {config.boxes}; change the two"
            )
        features = self._hidden(regions)
        if config.geometry == "sinusoid":
            boxes = box_waves(boxes, config.wavelengths)
        elif config.geometry == "crossed":
            left, top, right, bottom = boxes.unbind(-1)
            boxes = torch.cat([boxes, ((bottom - right) * (top - left))[..., None]], -1)
        if self.concat:
            features = torch.cat([features, boxes], -1)
        seen = self.project(self.input_drop(features))
        if self.activation is not None:
            seen = self.activation(seen)
        states = self.project_norm(seen)
        if self.box is not None:
            states = states + self.box_norm(self.box(boxes))
        if config.merge == "norm_mean":
            states = states / 2
        states = self.drop(self.norm(self._place(states, regions)))
        pooled = seen[:, 0] if config.pool == "first" else _mean(states, regions.keep)
        return Tokens(states, regions.keep, pooled, (states,) if layers else None)

    def _hidden(self, regions: Regions) -> Tensor:
        """Features [B, R, F] with the masked ones hidden."""
        if regions.masked is None:
            return regions.features
        masked = regions.masked[..., None]
        features = regions.features.masked_fill(masked, 0)
        return features if self.mask is None else features + masked.to(features.dtype) * self.mask

    def _place(self, states: Tensor, regions: Regions) -> Tensor:
        """Add what says image, and which words a region is aligned with."""
        if self.segment is not None:
            if regions.segments is None:
                states = states + self.segment.weight[self.config.segment]
            else:
                states = states + self.segment(regions.segments)
        if self.word is not None:
            words = self.word.weight
            hidden = None if regions.masked is None else regions.masked[..., None]
            states = states + (words[0] if hidden is None else torch.where(hidden, words[1], words[0]))
        if self.ordered is not None:
            states = states + self.ordered.weight[-states.shape[1] :].flip(0)
        if self.position is not None:
            states = states + self.position
        if regions.positions is not None:
            if self.aligned is None:
                raise ValueError("regions are aligned with words but model.vision.positions is false; set it to true")
            states = states + _mean_position(self.aligned, regions.positions)
        return states


def box_waves(boxes: Tensor, wavelengths: int) -> Tensor:
    """Relative corners [B, R, 4] -> K sines, then K cosines of each of the centre's x and y, width and height.

    These are in hundredths of the image's sides; wavelengths grow from 2 pi to nearly 1000 times that (VL-BERT's code).

    Returns:
        [B, R, 4 x 2 x K].
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    place = 100 * torch.cat([(low + high) / 2, high - low], -1)
    scale = 1000 ** (torch.arange(wavelengths, device=boxes.device, dtype=boxes.dtype) / wavelengths)
    angle = place[..., None] / scale  # [B, R, 4, K]
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


def _mean_position(table: nn.Embedding, positions: Tensor) -> Tensor:
    """Mean embedding of the positions [B, R] or [B, R, A] that are not -1; 0 where all are -1 -> [B, R, D]."""
    positions = positions if positions.dim() == 3 else positions[..., None]
    found = positions >= 0
    weight = found.to(table.weight.dtype)
    summed = (table(positions.clamp(min=0)) * weight[..., None]).sum(2)
    return summed / weight.sum(2, keepdim=True).clamp(min=1)


def _mean(states: Tensor, keep: Tensor | None) -> Tensor:
    """[B, R, D] -> [B, D], over the regions that are kept."""
    if keep is None:
        return states.mean(1)
    weight = keep[..., None].to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)
