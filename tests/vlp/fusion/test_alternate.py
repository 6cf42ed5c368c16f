"""Two images that the blocks of a fusion read by turns (NLVR2 of ALBEF and X-VLM)."""

from __future__ import annotations

import pytest
import torch
from helpers import SIZES, tiny_model
from torch import Tensor

from encoders.types import Tokens
from objectives import AnswerConfig
from vlp.checkpoint.native import load_weights, weights_of
from vlp.fusion.dual import DualStreamConfig

CONFIG = DualStreamConfig(**SIZES | {"layers": 4}, images="alternate")
PAIRS = torch.tensor([[0, 3], [2, 1]])


def tokens(rows: int, length: int, seed: int) -> Tokens:
    states = torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed))
    keep = torch.arange(length)[None] < torch.tensor([[length], [length - 2]]).repeat(rows // 2, 1)
    return Tokens(states, keep, states[:, 0])


def test_blocks_read_the_images_by_turns() -> None:
    fusion = CONFIG.build(32, 32, frozenset({"pooled"})).eval()
    image, text = tokens(4, 6, 0), tokens(2, 8, 1)
    states: Tensor = text.states
    for number, block in enumerate(fusion.blocks):
        rows = PAIRS[:, number % 2]
        seen = (text.keep[:, None, None], image.keep[rows][:, None, None])
        states = block(states, seen[0], memory=image.states[rows], memory_mask=seen[1])
    found = fusion(image, text, PAIRS)
    torch.testing.assert_close(found.text.states, states)
    swapped = fusion(image, text, PAIRS.flip(1))
    assert not torch.allclose(swapped.pooled, found.pooled), "the order of the images matters"


def test_two_blocks_share_keys_and_values() -> None:
    answer = {"answer": AnswerConfig(answers=("False", "True"), loss="ce")}
    model, other = tiny_model(CONFIG, answer), tiny_model(CONFIG, answer, seed=1)
    first, second = model.fusion.blocks[:2]
    assert first.cross.key is second.cross.key and first.cross.query is not second.cross.query
    stored = weights_of(model)
    assert "fusion.blocks.0.cross.key.weight" in stored and "fusion.blocks.1.cross.key.weight" not in stored
    load_weights(other, stored)
    assert torch.equal(other.fusion.blocks[3].cross.value.weight, model.fusion.blocks[2].cross.value.weight)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="even number of layers"):
        DualStreamConfig(**SIZES | {"layers": 3}, images="alternate").build(32, 32, frozenset())
    with pytest.raises(ValueError, match="attention cross"):
        DualStreamConfig(**SIZES, attention="co", images="alternate").build(32, 32, frozenset())
    fusion = CONFIG.build(32, 32, frozenset())
    with pytest.raises(ValueError, match="gives a text 2 images, here it has 1"):
        fusion(tokens(2, 6, 0), tokens(2, 8, 1), torch.tensor([0, 1]))
