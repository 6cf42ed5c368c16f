"""Word-region or word-patch alignment (WRA, WPA): words and image tokens of a true pair should be cheap to match.

The cost of a matching is the optimal transport distance of the two sets of fused states, approximated by IPOT (Xie et
al. 2018, algorithm 1; Chen et al. 2020, UNITER, section 3.2; Kim et al. 2021, ViLT, section 3.3).
Shapes: M rows, L text length, N image tokens, D width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.precision import full_precision
from encoders.types import Batch, Tokens
from objectives.base import Draw, Fuse, LossOutput, ModelSpec, Objective, Results, Rows, Side
from objectives.pairs import image_of_text
from objectives.settings import ObjectiveSettings


class WraConfig(ObjectiveSettings):
    """Move true pairs' words and image tokens together and false pairs' apart."""

    kind: Literal["wra"] = "wra"
    weight: float = 0.1
    """Weight of this loss in the sum."""
    rows: str = "itm"
    """The objective whose pairs it reads; they must be true ones and false ones (itm's scheme `replace_image`)."""
    special: bool = False
    """Also match [CLS], [SEP] and the image's first token (UNITER; ViLT leaves them out)."""
    beta: float = 0.5
    """Step size of the proximal point iteration."""
    iterations: int = 50
    """Iterations."""

    trains_embed: ClassVar[bool] = False
    reads: ClassVar[frozenset[Side]] = frozenset({"image", "text"})

    def build(self, spec: ModelSpec) -> Wra:
        """Build the objective.

        Raises:
            ValueError: the fusion gives no image states.
        """
        cross = spec.fusion == "dual_stream" and "causal" in spec.fusion_attention
        if spec.fusion == "none" or cross:
            raise ValueError(
                "objective wra needs fused image states, which model.fusion.kind "
                f"{spec.fusion}{' with attention cross' if cross else ''} does not give; use single_stream"
            )
        return Wra(self)


class Wra(Objective):
    """Optimal transport distance of true pairs less that of false ones."""

    def __init__(self, config: WraConfig) -> None:
        super().__init__()
        self.config = config
        self.needs = frozenset({Fuse(rows=config.rows)})

    def forward(self, results: Results, batch: Batch, draw: Draw) -> LossOutput:
        """(Sum of the true pairs' distances - sum of the false ones') / rows."""
        fused, rows = results[Fuse(rows=self.config.rows)], results.rows[self.config.rows]
        assert fused.image is not None and fused.text is not None
        text_keep, image_keep = _keep(fused.text), _keep(fused.image)
        if not self.config.special:
            at = torch.arange(text_keep.shape[1], device=text_keep.device)
            last = text_keep.sum(1, keepdim=True) - 1  # [SEP]
            text_keep = text_keep & (at > 0) & (at != last)
            image_keep = torch.cat([torch.zeros_like(image_keep[:, :1]), image_keep[:, 1:]], 1)
        distance = transport_distance(
            fused.text.states, fused.image.states, text_keep, image_keep, self.config.beta, self.config.iterations
        )
        true = self._true(batch, rows)
        loss = torch.where(true, distance, -distance).mean()
        return LossOutput(loss, {"distance": distance.detach().mean()})

    @staticmethod
    def _true(batch: Batch, rows: Rows) -> Tensor:
        """[M], whether a row's image is its text's own."""
        return rows.image_index == image_of_text(batch, rows.image_index.device).index_select(0, rows.text_index)


def _keep(tokens: Tokens) -> Tensor:
    """[M, N] bool."""
    if tokens.keep is not None:
        return tokens.keep
    return torch.ones(tokens.states.shape[:2], dtype=torch.bool, device=tokens.states.device)


def transport_distance(
    text: Tensor, image: Tensor, text_keep: Tensor, image_keep: Tensor, beta: float = 0.5, iterations: int = 50
) -> Tensor:
    """Cosine cost of matching two sets of states by their optimal transport plan, in float32.

    Args:
        text: [M, L, D].
        image: [M, N, D].
        text_keep: [M, L] bool, states that are matched.
        image_keep: [M, N] bool, likewise.
        beta: step size.
        iterations: of IPOT.

    Returns:
        [M]; the gradient flows through the cost, not through the plan (an envelope theorem). 0 where a set is empty.
    """
    with full_precision(text):
        text, image = (F.normalize(x.float(), dim=-1, eps=1e-5) for x in (text, image))
        pair = text_keep[:, :, None] & image_keep[:, None]
        cost = (1 - text @ image.mT).masked_fill(~pair, 0)  # [M, L, N]
        plan = transport_plan(cost.detach(), text_keep, image_keep, beta, iterations)
        return (cost * plan).sum((1, 2))


@torch.no_grad()
def transport_plan(cost: Tensor, rows: Tensor, columns: Tensor, beta: float, iterations: int) -> Tensor:
    """Transport plan [M, L, N] for a cost [M, L, N] between even masses on ``rows`` [M, L] and ``columns`` [M, N]."""
    pair = rows[:, :, None] & columns[:, None]
    num_rows, num_columns = (keep.sum(1).to(cost.dtype)[:, None, None] for keep in (rows, columns))
    closeness = torch.exp(-cost / beta) * pair
    plan = pair.to(cost.dtype)
    # Padding is scaled to almost nothing instead of being divided by zero.
    row_guard, column_guard = 1e4 * ~rows[:, :, None], 1e4 * ~columns[:, None]
    row_scale = rows[:, :, None] / num_rows  # [M, L, 1]
    for _ in range(iterations):
        kernel = closeness * plan
        column_scale = 1 / (num_columns * (kernel * row_scale).sum(1, keepdim=True) + column_guard)  # [M, 1, N]
        row_scale = 1 / (num_rows * (kernel * column_scale).sum(2, keepdim=True) + row_guard)
        plan = row_scale * kernel * column_scale
    return torch.where(pair, plan, 0)
