"""Word-patch alignment against IPOT written out for one pair, and what it refuses."""

import pytest
import torch
from helpers import tiny_batch, tiny_model
from torch.nn import functional as F

from objectives import ItmConfig, WraConfig
from objectives.base import Draw, Fuse, Replay
from objectives.wra import transport_distance


def ipot(text, image, beta=0.5, iterations=50):
    """Xie et al. 2018, algorithm 1, with one inner step, on the states of one pair without padding."""
    cost = 1 - F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T
    kernel, plan = torch.exp(-cost / beta), torch.ones_like(cost)
    left = torch.ones(len(text)) / len(text)
    for _ in range(iterations):
        scaled = kernel * plan
        right = 1 / (len(image) * (scaled.T @ left))
        left = 1 / (len(text) * (scaled @ right))
        plan = left[:, None] * scaled * right[None]
    return (cost * plan).sum(), plan


def test_distance_is_that_of_each_pair_alone():
    generator = torch.Generator().manual_seed(0)
    text, image = torch.randn(3, 6, 8, generator=generator), torch.randn(3, 9, 8, generator=generator)
    text_keep = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    image_keep = torch.tensor([[1] * 9, [1, 0, 1, 1, 0, 0, 1, 1, 0], [1] * 9]).bool()
    found = transport_distance(text, image, text_keep, image_keep)
    for row in range(2):
        wanted, plan = ipot(text[row][text_keep[row]], image[row][image_keep[row]])
        torch.testing.assert_close(found[row], wanted)
        torch.testing.assert_close(plan.sum(), torch.tensor(1.0))
    assert found[2] == 0, "nothing to match costs nothing"


@pytest.mark.parametrize("fusion", ["single_stream", "co"])
@pytest.mark.parametrize("special", [True, False])
def test_true_pairs_pull_and_false_pairs_push(fusion, special):
    objectives = {"itm": ItmConfig(scheme="replace_image"), "wra": WraConfig(special=special)}
    model, batch = tiny_model(fusion, objectives).eval(), tiny_batch(4)
    replaced = torch.tensor([True, False, False, True])
    draw = Replay({"itm.image": torch.tensor([1, 2, 3, 0]), "itm.replace": replaced})
    out = model.losses(batch, draw)["wra"]
    rows = model.objectives["itm"].rows(model.run([], batch), batch, draw)
    fused = model.run([Fuse(rows="itm")], batch, rows=rows)[Fuse(rows="itm")]
    wanted = []
    for row in range(4):
        length = int(fused.text.keep[row].sum())
        text, image = fused.text.states[row, :length], fused.image.states[row]
        wanted.append(ipot(text, image)[0] if special else ipot(text[1:-1], image[1:])[0])
    distance = torch.stack(wanted)
    torch.testing.assert_close(out.loss, torch.where(replaced, -distance, distance).mean())
    torch.testing.assert_close(out.metrics["distance"], distance.mean())
    loss, _ = model(batch, Draw(0))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_what_it_needs():
    with pytest.raises(ValueError, match="attention cross does not give"):
        tiny_model("dual_stream", {"itm": ItmConfig(), "wra": WraConfig()})
    with pytest.raises(ValueError, match="reads the pairs of objective itm"):
        tiny_model("single_stream", {"wra": WraConfig()})
