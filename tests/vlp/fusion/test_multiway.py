"""The multiway fusion: branches, relative positions, reading word by word."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_batch
from torch import Tensor

from encoders import PatchConfig, TextConfig
from encoders.types import Batch, Images, Tokens
from objectives import ClassifyConfig, ItcConfig, ItmConfig, MlmConfig, Seq2SeqMlmConfig
from objectives.base import Draw, Embed, Encode, Fuse
from vlp.embed import EmbedConfig
from vlp.fusion.multiway import Multiway, MultiwayConfig
from vlp.fusion.positions import RelativePositions, _geometric, _spline
from vlp.fusion.single import SingleStreamConfig
from vlp.model import Model, ModelConfig, build_model

SIZES = {"width": 32, "layers": 3, "heads": 4}
ALL = frozenset({"image", "text", "pooled"})


def multiway(**fields) -> Multiway:
    torch.manual_seed(0)
    fusion = MultiwayConfig(**SIZES, **fields).build(32, 32, ALL, (2, 2)).eval()
    with torch.no_grad():
        for name, one in fusion.named_parameters():
            if "scale" in name or "table" in name:
                one.normal_()
    return fusion


def tokens(rows: int, length: int, seed: int, padded: int = 0) -> Tokens:
    states = torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed))
    keep = torch.ones(rows, length, dtype=torch.bool)
    keep[0, length - padded :] = False
    return Tokens(states, keep, states[:, 0])


def vlmo(objectives, **fusion) -> Model:
    """A tower of both modalities, as VLMo is."""
    config = ModelConfig(
        vision=PatchConfig(model="vit_tiny_patch16_224", image_size=16, patch_size=4, width=32, depth=0),
        text=TextConfig(width=32, heads=4, layers=0, vocabulary_size=50, max_length=8, absolute_positions=False),
        fusion=MultiwayConfig(
            **SIZES,
            pair_layers=1,
            key_bias=False,
            layer_scale=0.1,
            relative_positions=8,
            modality_embedding=True,
            **fusion,
        ),
        embed=EmbedConfig(width=16, branches=("vl",)),
    )
    return build_model(config, objectives)


PRETRAINING = {
    "itc": ItcConfig(weight=0.5),
    "itc_vl": ItcConfig(weight=0.5, branch="vl"),
    "itm": ItmConfig(),
    "mlm": MlmConfig(weight=0.25, tied=False),
}


def test_every_parameter_of_vlmo_is_trained() -> None:
    model = vlmo(PRETRAINING)
    loss, outputs = model(tiny_batch(4), Draw(0))
    loss.backward()
    assert outputs.keys() == PRETRAINING.keys()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_branches_part_where_feed_forwards_of_pairs_begin() -> None:
    model = vlmo(PRETRAINING).eval()
    passes = [Encode("image"), Encode("image", branch="vl"), Embed("image"), Embed("image", branch="vl")]
    found = model.run(passes, tiny_batch(3), layers=True)
    main, pair = found[passes[0]], found[passes[1]]
    assert all(torch.equal(a, b) for a, b in zip(main.layers[:3], pair.layers[:3], strict=True))
    assert not torch.equal(main.layers[3], pair.layers[3])
    assert not torch.equal(found[passes[2]], found[passes[3]])
    with torch.no_grad():  # the branch reads the pairs' layers, and the pairs' alone
        for name, one in model.fusion.blocks[-1].named_parameters():
            if ".image." in name or ".text." in name:
                one.add_(1.0)
    again = model.run(passes[:2], tiny_batch(3))
    assert torch.equal(again[passes[1]].states, pair.states) and not torch.equal(again[passes[0]].states, main.states)


def test_a_branch_that_the_fusion_has_not_is_refused() -> None:
    config = vlmo(PRETRAINING).config
    single = config.model_copy(update={"fusion": SingleStreamConfig(**SIZES)})
    with pytest.raises(ValueError, match="no branch 'vl'; use kind multiway"):
        build_model(single, PRETRAINING)(tiny_batch(2), Draw(0))


def test_relative_positions_are_what_the_distance_says() -> None:
    positions = RelativePositions((2, 3), 6, layers=2, heads=2)
    torch.nn.init.normal_(positions.table)
    bias = positions(7, 5)
    assert bias.shape == (2, 2, 12, 12)
    image, text = bias[:, :, 1:7, 1:7], bias[:, :, 8:, 8:]
    assert torch.equal(image[..., 0, 1], image[..., 4, 5]) and torch.equal(image[..., 0, 4], image[..., 1, 5])
    assert not torch.equal(image[..., 0, 1], image[..., 1, 0]) and not torch.equal(image[..., 2, 3], image[..., 0, 1])
    assert torch.equal(text[..., 0, 2], text[..., 1, 3]) and not torch.equal(text[..., 0, 2], text[..., 2, 0])
    assert bias[:, :, :7, 7:].flatten(2).std(2).max() == 0 and bias[:, :, 7:, :7].flatten(2).std(2).max() == 0
    torch.testing.assert_close(positions(7, 0), bias[:, :, :7, :7])
    torch.testing.assert_close(positions(0, 3), bias[:, :, 7:10, 7:10])
    assert positions.index(7, 6).unique().numel() == len(positions.table)  # no row is idle


def test_mistakes_about_positions_are_one_line() -> None:
    fusion = multiway(relative_positions=8)
    with pytest.raises(ValueError, match="relative_positions is 8; shorten"):
        fusion(None, tokens(1, 9, 0))
    with pytest.raises(ValueError, match="images of 6 tokens"):
        fusion(tokens(1, 6, 0), None)
    with pytest.raises(ValueError, match="needs an image grid"):
        MultiwayConfig(**SIZES, relative_positions=8).build(32, 32, ALL)
    with pytest.raises(ValueError, match="norm post"):
        MultiwayConfig(**{**SIZES, "norm": "post"}).build(32, 32, ALL)


@pytest.mark.parametrize("fields", [{"decoupled": True, "sub_norm": True}, {"relative_positions": 8, "pair_layers": 2}])
def test_word_by_word_is_all_at_once(fields) -> None:
    """Also with a modality's own layers, a layer of pairs, and biases by distance."""
    fusion = multiway(modality_embedding=True, layer_scale=1.0, **fields)
    image, text = tokens(3, 5, 0), tokens(3, 7, 1)
    wanted = fusion(image, text, None, "causal").text.states
    caches = fusion.start(image)
    found = [fusion.step(text.states[:, first:last], first, 5, caches) for first, last in ((0, 3), (3, 4), (4, 7))]
    torch.testing.assert_close(torch.cat(found, 1), wanted)


def test_an_image_a_row_by_itself_or_with_others() -> None:
    """`each` is two passes of `one`, whose order a learned vector tells."""
    pair = multiway(images="each", modality_embedding=True, pooler="cls_both")
    image, text, index = tokens(3, 5, 0, padded=2), tokens(2, 6, 1, padded=3), torch.tensor([[0, 1], [2, 0]])
    both = pair(image, text, index)
    assert both.pooled.shape == (2, 4 * 32) == (2, pair.pooled_width)
    state = pair.state_dict()
    for number in range(2):
        single = multiway(modality_embedding=True, pooler="cls_both")
        rows = state["modality.weight"][[2 * number, 1]]
        single.load_state_dict({**state, "modality.weight": rows})
        wanted = single(image, text, index[:, number]).pooled
        torch.testing.assert_close(both.pooled[:, number * 64 : number * 64 + 64], wanted)


def test_splines_go_through_what_is_stored_and_keep_cubics() -> None:
    x = _geometric(13, 23)
    assert len(x) == 13 and x[-1] == pytest.approx(11, abs=1e-3) and (x.diff().diff()[6:] > 0).all()
    at = torch.linspace(-11, 11, 50).double()
    weights = _spline(x, at)
    for power in range(4):
        torch.testing.assert_close(weights @ x**power, at.clamp(x[0], x[-1]) ** power, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(_spline(x, x), torch.eye(13).double(), rtol=0, atol=1e-12)


def test_a_table_of_another_grid_is_resized() -> None:
    small, large = (RelativePositions((side, side), 6, 1, 2) for side in (3, 5))
    at = torch.cartesian_prod(torch.arange(-2.0, 3), torch.arange(-2.0, 3))
    stored = torch.randn(len(small.table), 2)
    stored[: small.offsets] = torch.stack([torch.full((25,), 7.0), at[:, 0].sign()], 1)
    found = large.resized(stored)
    assert found is not None and found.shape == large.table.shape
    torch.testing.assert_close(found[large.offsets :], stored[small.offsets :])
    grid = found[: large.offsets].unflatten(0, (9, 9))
    torch.testing.assert_close(grid[..., 0], torch.full((9, 9), 7.0))
    torch.testing.assert_close(grid[..., 1], -grid.flip(0)[..., 1], rtol=0, atol=1e-5)
    assert large.resized(torch.randn(len(stored) + 1, 2)) is None


def losses(model: Model, batch: Batch) -> dict[str, Tensor]:
    return {name: one.loss for name, one in model.losses(batch, Draw(0)).items()}


def test_text_alone_and_images_alone_train_a_tower() -> None:
    """VLMo's text stage and image classification: neither needs the other modality."""
    model = vlmo({"mlm": MlmConfig(alone=True, tied=False)})
    assert model.needs() == {Encode("text", "masked")}
    assert losses(model, tiny_batch(3, ("masked",)))["mlm"] > 0
    model = vlmo({"classify": ClassifyConfig(classes=("cat", "dog"), pool="patches", norm=True)})
    pixels = tiny_batch(3).images["clean"].pixels

    def classify(rows: list[int], classes: list[int]) -> Tensor:
        batch = Batch(images={"clean": Images(pixels[rows])}, targets={"class": torch.tensor(classes)})
        return losses(model, batch)["classify"]

    mean = (classify([0], [0]) + classify([2], [1])) / 2
    torch.testing.assert_close(classify([0, 1, 2], [0, -100, 1]), mean)  # the second has no class


def test_masked_captions_do_not_see_what_follows() -> None:
    model = vlmo({"seq2seq_mlm": Seq2SeqMlmConfig(head="linear", tied=False)}).eval()
    assert model.needs() == {Fuse(text="seq2seq_mlm:caption")}
    assert model.objectives["seq2seq_mlm"].views["seq2seq_mlm:caption"].attention == "causal"
