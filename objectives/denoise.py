"""Denoising: of a text with a hidden fragment, beside its image, the decoder writes the whole, or the fragment.

XGPT's image-conditioned denoising autoencoding, where one mask stands for a fragment whose length is not known, and
its image-conditioned masked language modelling, where each word has its mask (Xia et al. 2020, arXiv 2003.01473; of
texts alone Song et al. 2019, MASS).
Shapes: T texts, L length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from encoders.types import AttentionKind, Vocabulary
from objectives.base import ModelSpec, ViewText
from objectives.reconstruct import Reconstruct, ReconstructSettings


class DenoiseConfig(ReconstructSettings):
    """Write a text, or its hidden fragment."""

    kind: Literal["denoise"] = "denoise"
    weight: float = 1.0
    """Weight of this loss in the sum."""
    fragment: float = Field(0.5, gt=0, le=1)
    """Length of the fragment, of the text's; one token at least, beginning anywhere."""
    masks: Literal["one", "each"] = "one"
    """What stands for it: one mask, whatever its length, or a mask for each token."""
    write: Literal["text", "fragment"] = "text"
    """What the decoder writes."""

    def build(self, spec: ModelSpec) -> Reconstruct:
        """Build the objective.

        Raises:
            ValueError: there is no fusion that reads the text, or no decoder that writes.
        """
        self.check(spec, self.kind)
        # Views of other lengths of fragments are others.
        share = self.fragment
        given, written = ((f"denoise:{part}/{share:g}", FragmentView(part, share)) for part in (self.masks, self.write))
        return Reconstruct(self, spec, given, written)


@dataclass(frozen=True)
class FragmentView:
    """A text whose fragment is hidden by one mask or by one each; or what is written: all of it, or the fragment."""

    part: Literal["one", "each", "text", "fragment"]
    share: float
    draws: str = "denoise"
    """One name for all parts, so that they hide the same."""

    @property
    def attention(self) -> AttentionKind:
        """Of the part."""
        return "full" if self.part in ("one", "each") else "causal"

    def make(
        self, ids: np.ndarray, word_starts: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
    ) -> ViewText:
        """Make the view of one text [L] with its special ids."""
        if vocabulary.mask is None:
            raise ValueError(
                "objective denoise needs a tokenizer with a mask token; this one has none, use another, or set "
                "data.tokenizer.add_mask true"
            )
        words = np.flatnonzero(~np.isin(ids, [vocabulary.cls, vocabulary.sep, vocabulary.pad]))
        length = max(1, round(self.share * len(words)))
        first = int(generator.integers(max(1, len(words) - length + 1)))
        hidden = words[first : first + length]
        if self.part in ("one", "each"):
            given = ids.copy()
            given[hidden] = vocabulary.mask
            return ViewText(np.delete(given, hidden[1:]) if self.part == "one" else given)
        inner = ids[words if self.part == "text" else hidden]
        written = np.concatenate([[vocabulary.bos], inner, [vocabulary.eos]]).astype(np.int64)
        return ViewText(written, np.append(written[1:], -100))
