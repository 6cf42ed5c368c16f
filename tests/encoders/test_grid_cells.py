"""Grid cells: a random part of them in training, and the largest of every four."""

from __future__ import annotations

import torch

from encoders import GridConfig
from encoders.grid import GridEncoder
from encoders.types import Images

PIXELS = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encoder(**more: object) -> GridEncoder:
    torch.manual_seed(0)
    return GridConfig(model="resnet10t", image_size=96, **more).build()  # type: ignore[arg-type]


def test_training_reads_a_part_of_the_cells_drawn_for_each_image() -> None:
    part, whole = encoder(sample=4), encoder()
    every = whole.eval()(Images(PIXELS)).states
    assert torch.equal(part.eval()(Images(PIXELS)).states, every) and every.shape[1] == 9
    part.train()
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        found = part(Images(PIXELS)).states
        torch.manual_seed(seed)
        assert found.shape[1] == 4 and torch.equal(found, part(Images(PIXELS)).states)
        for row in range(3):
            at = [int((every[row] == cell).all(1).nonzero()[0]) for cell in found[row]]
            assert at == sorted(set(at)), "in their order, none twice"
            seen.add(tuple(at))
    assert len(seen) > 30 and {place for places in seen for place in places} == set(range(9))


def test_more_than_there_are_is_all() -> None:
    assert encoder(sample=100).train()(Images(PIXELS)).states.shape[1] == 9


def test_the_largest_of_every_four_cells() -> None:
    every = encoder().eval()(Images(PIXELS)).states.unflatten(1, (3, 3))
    pooled = encoder(max_pool=True).eval()(Images(PIXELS), layers=True)
    assert pooled.states.shape[1] == 4
    torch.testing.assert_close(pooled.states[:, 0], every[:, :2, :2].flatten(1, 2).amax(1))
    torch.testing.assert_close(pooled.states[:, 3], every[:, 2, 2])
