"""Every recipe's number of parameters beside the published one, counted as its source counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vlp.config import load
from vlp.parts import parameters_by_part
from vlp.run import RunConfig, settle
from vlp.show import meta_model

Parts = dict[str, int]


def everything(parts: Parts) -> int:
    """All that is trained, with projections, temperatures and heads; not the momentum teacher."""
    return sum(number for name, number in parts.items() if name != "teacher")


def of(*names: str) -> Callable[[Parts], int]:
    """Only these parts."""
    return lambda parts: sum(parts[name] for name in names)


def gelu_head(width: int, outputs: int) -> int:
    """Linear to twice the width, norm, linear."""
    hidden = 2 * width
    return (width + 1) * hidden + 2 * hidden + (hidden + 1) * outputs


# Published parameters, in which of our parts they are counted, and how near we must be; a recipe may be counted twice,
# what is counted standing behind a comma.
PUBLISHED: dict[str, tuple[float, Callable[[Parts], int], float]] = {
    # 123.7M text (BERT with cross-attention and its MLM head) + 85.8M image; projections and ITM head not counted.
    "albef": (209.5e6, of("vision", "text", "fusion", "objectives.mlm"), 0.001),
    # Both heads counted, the codebook not.
    "beit3_base": (276e6, of("vision", "text", "fusion", "objectives.mlm", "objectives.mim"), 0.01),
    # As retrieval counts it: image, text with cross-attention, projections, ITM head (transformers' class, whose images
    # of 384 pixels have 380 positions more).
    "blip": (223.7e6 - 380 * 768, of("vision", "text", "fusion", "embed", "objectives.itm"), 0.001),
    # With all shared but the decoder's self-attention (paper).
    "blip, decoder": (252e6, everything, 0.01),
    "clip_vit_b16": (149.6e6, everything, 0.001),
    "clip_vit_b32": (151.3e6, everything, 0.001),
    "clip_vit_l14": (427.6e6, everything, 0.001),
    # Without codebook and heads; its towers' poolers (1.2M), which no loss reads, are not here.
    "flava": (241.4e6, of("vision", "text", "fusion", "embed"), 0.01),
    # transformers' model for pretraining, whose head of 9,500 answers the recipe lacks.
    "lxmert": (228.1e6, lambda parts: everything(parts) + gelu_head(768, 9500), 0.001),
    # The survey's figure, which does not say what it includes: everything, with MLM's untied output of 38.6M.
    "meter": (345e6, everything, 0.04),
    # The repository's figure; ours lacks the decoder's positions of image codes (1.9M).
    "ofa_base": (180e6, everything, 0.01),
    "siglip_b16": (203.2e6, everything, 0.001),
    # BERT with cross-attention and its MLM head.
    "tcl": (123.7e6, of("text", "fusion", "objectives.mlm"), 0.001),
    # The paper's own figures: the layers and the pooler.
    "uniter_base": (86e6, of("fusion"), 0.01),
    "uniter_large": (303e6, of("fusion"), 0.01),
    "villa": (86e6, of("fusion"), 0.01),
    # transformers' T5-base; of VL-T5's code 72 words more, and the embedding of regions.
    "vl_t5": (222_903_552 + 72 * 768 + (2048 + 5 + 2 + 2 + 2) * 768, everything, 1e-6),
    # Blocks and patch embedding, with neither the word embeddings nor the heads.
    "vilt": (87.4e6, of("vision", "fusion"), 0.01),
    # transformers' model for pretraining at features of 2048; its table of visual positions has 512 rows, ours one.
    "visualbert": (112.1e6, everything, 0.005),
    # Blocks with all their feed-forwards, patch and word embeddings, without heads and projections.
    "vlmo_base": (175e6, of("vision", "text", "fusion"), 0.01),
    "xvlm": (216e6, everything, 0.01),
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_parameters_are_the_published_ones(recipe: str) -> None:
    published, count, tolerance = PUBLISHED[recipe]
    model = meta_model(settle(load(RunConfig, f"pretrain/{recipe.partition(',')[0]}")))
    assert count(parameters_by_part(model)) == pytest.approx(published, rel=tolerance)
