"""Heads that several objectives build from. Shapes: R rows, D width, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from encoders.layers import ACTIVATIONS, Activation, initialise


class VocabularyHead(nn.Module):
    """BERT's prediction head: dense, activation, norm, then word scores by the (tied) word embedding plus a bias."""

    def __init__(
        self,
        width: int,
        vocabulary_size: int,
        tied: nn.Parameter | None,
        *,
        activation: Activation = "gelu",
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        word_width = width if tied is None else tied.shape[1]
        self.dense = nn.Linear(width, word_width)
        self.norm = nn.LayerNorm(word_width, eps)
        self.decoder = nn.Linear(word_width, vocabulary_size)
        self.activation = ACTIVATIONS[activation]
        initialise(self)
        if tied is not None:
            self.decoder.weight = tied

    def forward(self, states: Tensor) -> Tensor:
        """[..., D] -> logits [..., V]."""
        return self.decoder(self.norm(self.activation(self.dense(states))))


class ScaledWords(nn.Linear):
    """Word scores of states over the root of their width, as words of the usual size need it (T5, where tied)."""

    def forward(self, states: Tensor) -> Tensor:
        """[..., D] -> logits [..., V]."""
        return super().forward(states * self.in_features**-0.5)


WordHead: TypeAlias = Literal["bert", "linear", "bare", "scaled"]
"""What gives word scores: dense, activation, norm, words (BERT); words alone (BEiT-3); these without bias (CoCa), or
of states over the root of their width (T5)."""


def word_head(
    kind: WordHead,
    width: int,
    vocabulary_size: int,
    tied: nn.Parameter | None,
    eps: float,
    *,
    activation: Activation = "gelu",
) -> nn.Module:
    """Build a head of this kind, states [..., D] -> logits [..., V].

    Raises:
        ValueError: a linear head is to share words of another width.
    """
    if kind == "bert":
        return VocabularyHead(width, vocabulary_size, tied, activation=activation, eps=eps)
    make = ScaledWords if kind == "scaled" else nn.Linear
    head = make(width, vocabulary_size, bias=kind == "linear")
    initialise(head)
    if tied is not None:
        if tied.shape[1] != width:
            raise ValueError(f"a linear head of width {width} cannot share words of width {tied.shape[1]}; use bert")
        head.weight = tied
    return head


class MlpHead(nn.Sequential):
    """Linear, norm, GELU, Linear (ViLT's, METER's and X-VLM's task heads)."""

    def __init__(self, width: int, outputs: int, hidden: int | None = None, eps: float = 1e-5) -> None:
        hidden = hidden or 2 * width
        super().__init__(nn.Linear(width, hidden), nn.LayerNorm(hidden, eps), nn.GELU(), nn.Linear(hidden, outputs))
        initialise(self)


class NormMlpHead(nn.Sequential):
    """Norm, linear, norm, GELU, linear (BEiT-3's head for two images)."""

    def __init__(self, width: int, outputs: int, hidden: int | None = None, eps: float = 1e-5) -> None:
        super().__init__(nn.LayerNorm(width, eps), *MlpHead(width, outputs, hidden, eps))


class GeluMlpHead(nn.Sequential):
    """Linear, GELU, norm, Linear (UNITER's, LXMERT's and VOLTA's task heads)."""

    def __init__(self, width: int, outputs: int, hidden: int | None = None, eps: float = 1e-12) -> None:
        hidden = hidden or 2 * width
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.LayerNorm(hidden, eps), nn.Linear(hidden, outputs))
        initialise(self)


class LinearHead(nn.Linear):
    """One linear layer; there is nothing hidden."""

    def __init__(self, width: int, outputs: int, hidden: int | None = None) -> None:
        super().__init__(width, outputs)
        initialise(self)


class ReluHead(nn.Sequential):
    """Linear, ReLU, Linear (ALBEF's and BLIP's task heads)."""

    def __init__(self, width: int, outputs: int, hidden: int | None = None) -> None:
        hidden = hidden or width
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        initialise(self)


PooledHead: TypeAlias = Literal["mlp", "norm_mlp", "gelu_mlp", "relu", "linear"]
"""Kinds of heads on a pooled vector."""

POOLED_HEADS: Mapping[PooledHead, Callable[[int, int, int | None], nn.Module]] = {
    "mlp": MlpHead,
    "norm_mlp": NormMlpHead,
    "gelu_mlp": GeluMlpHead,
    "relu": ReluHead,
    "linear": LinearHead,
}
"""Head of each kind: input width, outputs, hidden width (None: its own choice) -> states [..., D] to [..., outputs]."""


def labelled(states: Tensor, labels: Tensor, label_at: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the states [K, D] at labelled positions and their labels [K], -100 at padding.

    ``states`` [T, L, D] and ``labels`` [T, L]; with ``label_at`` [K] (flat positions, -1 = padding) only those are
    taken, without boolean indexing (no host synchronisation, a shape that does not change).
    """
    flat, targets = states.flatten(0, 1), labels.flatten()
    if label_at is None:
        return flat, targets
    at = label_at.clamp(min=0)
    return flat.index_select(0, at), torch.where(label_at >= 0, targets.index_select(0, at), -100)
