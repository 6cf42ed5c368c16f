"""Models of a detector's regions: the encoder's promises, the objectives on them, and whole models on every device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import SIZES, VOCABULARY
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from encoders import RegionConfig, TextConfig
from encoders.types import Batch, Regions
from objectives import (
    AnswerConfig,
    ItmConfig,
    MlmConfig,
    MrmConfig,
    ObjectiveConfig,
    PairAttentionConfig,
    RankConfig,
    WraConfig,
)
from objectives.base import Draw, Fuse
from objectives.mrm import RegionTargetConfig, region_terms
from vlp.fusion.single import SingleStreamConfig
from vlp.fusion.sublayers import SublayersConfig
from vlp.model import Model, ModelConfig, build_model
from vlp.show import synthetic_batch

F_, R = 12, 9
BARE = TextConfig(**SIZES | {"layers": 0}, vocabulary_size=VOCABULARY, max_length=16)
REGION = {"features": F_, "width": 32, "number": R}
ENCODERS = {
    "UNITER": RegionConfig(**REGION, segments="text", mask_embedding=True),
    "ViLBERT": RegionConfig(**REGION, boxes=5, merge="sum"),
    "LXMERT": RegionConfig(**REGION, boxes=4, merge="norm_mean", norm="none"),
    "VisualBERT": RegionConfig(**REGION, boxes=0, merge="sum", norm="text", segments="own", positions=True),
    "Oscar": RegionConfig(**REGION, boxes=6, merge="concat", norm="none"),
    "VL-BERT": RegionConfig(
        **REGION,
        boxes=4,
        geometry="sinusoid",
        wavelengths=4,
        merge="norm_concat",
        activation="relu",
        norm="none",
        segments="own",
        word=True,
        mask_embedding=True,
        pool="first",
    ),
}
CLASSES = {"classes": RegionTargetConfig(outputs=7)}
ANSWERS = ("yes", "no", "maybe")
MODELS: dict[str, tuple[Any, dict[str, ObjectiveConfig]]] = {
    "UNITER": (
        SingleStreamConfig(**SIZES, modality_embedding=False),
        {
            "mlm": MlmConfig(),
            "mrfr": MrmConfig(targets={"features": RegionTargetConfig(outputs=F_, losses=("mse", "nce"), tied=True)}),
            "mrc": MrmConfig(targets=CLASSES),
            "itm": ItmConfig(scheme="replace_image"),
            "wra": WraConfig(special=True),
        },
    ),
    "ViLBERT": (
        SublayersConfig(**SIZES, sublayers=("tt", "t", "tv vt", "t v", "tt vv", "t v"), pooler="product"),
        {
            "mlm": MlmConfig(image="masked"),
            "mrm": MrmConfig(text="masked", targets={"classes": RegionTargetConfig(outputs=7, reduce="sum")}),
            "itm": ItmConfig(scheme="given", masked=True),
        },
    ),
    "LXMERT": (
        SublayersConfig(**SIZES, sublayers=("tt vv", "t v", "tv vt shared", "tt vv", "t v")),
        {
            "mlm": MlmConfig(image="masked"),
            "mrm": MrmConfig(
                text="masked",
                mean="all",
                targets={
                    "objects": RegionTargetConfig(outputs=7, losses=("class",), weight=6.667),
                    "features": RegionTargetConfig(outputs=F_, losses=("smooth_l1",), weight=6.667),
                },
            ),
            "itm": ItmConfig(scheme="given", masked=True),
            "answer": AnswerConfig(answers=ANSWERS, loss="ce", head="gelu_mlp", masked=True),
        },
    ),
    "VisualBERT": (
        SingleStreamConfig(**SIZES, modality_embedding=False),
        {"mlm": MlmConfig(), "itm": ItmConfig(scheme="given", masked=True), "mrc": MrmConfig(targets=CLASSES)},
    ),
    "Oscar": (
        SingleStreamConfig(**SIZES, modality_embedding=False),
        {"mlm": MlmConfig(), "rank": RankConfig(loss="margin", scheme="both", negatives=2)},
    ),
    "VL-BERT": (
        SingleStreamConfig(**SIZES, modality_embedding=False, words_see="image", join_norm=True),
        {"mlm": MlmConfig(image="masked"), "mrm": MrmConfig(text="masked", targets=CLASSES, norm=False)},
    ),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def model_of(name: str, objectives: dict[str, ObjectiveConfig] | None = None, **more: Any) -> Model:
    fusion, own = MODELS[name]
    config = ModelConfig(vision=ENCODERS[name], text=BARE, fusion=fusion.model_copy(update=more))
    return build_model(config, own if objectives is None else objectives)


def regions(name: str, rows: int = 3) -> Regions:
    """Rows of unlike length; what stands at padding is noise that nobody may read."""
    boxes = ENCODERS[name].boxes
    keep = torch.arange(R) < torch.tensor([[R], [5], [7]])[:rows]
    return Regions(torch.randn(rows, R, F_), torch.rand(rows, R, boxes), keep)


def complete(model: torch.nn.Module) -> None:
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing, f"no gradient for {missing}"


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name: str) -> None:
    encoder, given = model_of(name, {}).vision.eval(), regions(name)
    found = encoder(given, layers=True)
    assert found.states.shape == (3, R, 32) and found.pooled.shape == (3, 32) and found.keep is given.keep
    order = torch.tensor([2, 0, 1])
    fields = {one: getattr(given, one)[order] for one in ("features", "boxes", "keep")}
    torch.testing.assert_close(encoder(replace(given, **fields)).states, found.states[order])
    features = torch.where(given.keep[..., None], given.features, 0)
    torch.testing.assert_close(encoder(replace(given, features=features)).pooled, found.pooled)
    shorter = Regions(given.features[:, :7], given.boxes[:, :7], given.keep[:, :7])
    torch.testing.assert_close(encoder(shorter).states, found.states[:, :7])


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_features_are_not_read(name: str) -> None:
    encoder, given = model_of(name, {}).vision.eval(), regions(name)
    masked = torch.arange(R) % 3 == torch.arange(3)[:, None]
    hidden = replace(given, masked=masked)
    other = replace(hidden, features=torch.where(masked[..., None], torch.randn(3, R, F_), given.features))
    assert torch.equal(encoder(hidden).states, encoder(other).states)
    assert not torch.equal(encoder(hidden).states, encoder(given).states)
    if encoder.mask is not None:
        before = encoder(hidden).states
        with torch.no_grad():
            encoder.mask.add_(torch.randn(F_))
        assert ((encoder(hidden).states != before).any(-1) == masked).all(), "what stands for hidden features"


def test_what_is_shared_with_the_text() -> None:
    uniter, visualbert = model_of("UNITER"), model_of("VisualBERT")
    assert uniter.vision.segment is uniter.text.embeddings.segment
    assert visualbert.vision.norm is visualbert.text.embeddings.norm
    assert visualbert.vision.aligned is visualbert.text.embeddings.position
    assert visualbert.vision.segment is not visualbert.text.embeddings.segment


def test_words_that_a_region_is_aligned_with() -> None:
    model = model_of("VisualBERT", {}).eval()
    given = regions("VisualBERT")
    positions = torch.full((3, R, 2), -1)
    positions[0, 1] = torch.tensor([2, 4])
    positions[1, 0, 0] = 3
    bare = RegionConfig(**REGION, boxes=0, merge="sum", norm="none", segments="own", positions=True)
    encoder = build_model(ModelConfig(vision=bare, text=BARE, fusion=MODELS["VisualBERT"][0]), {}).vision
    added = encoder(replace(given, positions=positions)).states - encoder(given).states
    table = encoder.aligned.weight
    torch.testing.assert_close(added[0, 1], (table[2] + table[4]) / 2)
    torch.testing.assert_close(added[1, 0], table[3])
    assert not added[2].any()
    with pytest.raises(ValueError, match=r"model\.vision\.positions is false; set it to true"):
        model_of("UNITER", {}).vision(replace(regions("UNITER"), positions=positions))
    assert model.vision.aligned is not None


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of width 5 and boxes of 7 values, but model\.vision\.features is 12"):
        model_of("UNITER", {}).vision(Regions(torch.zeros(1, 2, 5), torch.zeros(1, 2, 7)))
    with pytest.raises(ValueError, match="reads what a detector found, not pixels"):
        _ = ENCODERS["UNITER"].image_size
    wide = BARE.model_copy(update={"width": 64})
    with pytest.raises(ValueError, match=r"needs model\.text\.kind text of width 32"):
        build_model(ModelConfig(vision=ENCODERS["UNITER"], text=wide, fusion=MODELS["UNITER"][0]), {})
    with pytest.raises(ValueError, match=r"objectives\.mrm\.targets is empty"):
        model_of("UNITER", {"mrm": MrmConfig()})
    with pytest.raises(ValueError, match="unknown"):
        model_of("ViLBERT", sublayers=("tt", "t", "xx"))
    with pytest.raises(ValueError, match="only one stream is there to share"):
        model_of("ViLBERT", sublayers=("tt shared", "t"))
    with pytest.raises(ValueError, match="not one of attention and feed-forward"):
        model_of("ViLBERT", sublayers=("tt t",))
    with pytest.raises(ValueError, match="give tv and vt"):
        model_of("ViLBERT", sublayers=("tt tv", "t"))
    with pytest.raises(ValueError, match="streams of different widths cannot share weights"):
        model_of("ViLBERT", sublayers=("tv vt shared", "t v"), image_width=64)


# Whole models


@pytest.mark.parametrize("name", MODELS)
def test_step(name: str) -> None:
    model = model_of(name).train()
    batch = synthetic_batch(model, 6, 12, device="cpu")
    loss, outputs = model(batch, Draw(0))
    loss.backward()
    assert outputs.keys() == MODELS[name][1].keys() and loss.isfinite()
    complete(model)


@pytest.mark.parametrize("name", MODELS)
def test_step_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = model_of(name).train()
    loss, _ = model(synthetic_batch(model, 6, 12), Draw(0))
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", MODELS)
def test_step_without_waiting_for_the_device(name: str) -> None:
    model = model_of(name).train()
    batch = synthetic_batch(model, 6, 12, device="cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(p) for n, p in model.named_parameters()}
        loss, _ = torch.func.functional_call(model, fake, (batch, Draw(0)))
    assert loss.shape == ()


# Masked region modelling


def tiny(**targets: RegionTargetConfig) -> tuple[Model, Batch]:
    model = model_of("UNITER", {"mlm": MlmConfig(), "mrm": MrmConfig(targets=targets)}).eval()
    return model, synthetic_batch(model, 3, 10, device="cpu")


def hidden(batch: Batch, **more: Any) -> Batch:
    return replace(batch, images=batch.images | {"masked": replace(batch.images["masked"], **more)})


def outputs_of(model: Model, batch: Batch, name: str) -> Tensor:
    return model.objectives["mrm"].predict(model.run({Fuse("masked")}, batch)[Fuse("masked")].image.states)[name]


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_distribution_of_hidden_regions(reduce: Any) -> None:
    model, batch = tiny(classes=RegionTargetConfig(outputs=7, reduce=reduce))
    target = torch.randn(3, R, 7).softmax(-1)
    batch = hidden(batch, targets={"classes": target})
    masked = batch.images["masked"].masked
    found = model.losses(batch, Draw(0), ["mrm"])["mrm"].loss
    logits = outputs_of(model, batch, "classes")
    terms = target * (target.log() - logits.log_softmax(-1))
    terms = terms.mean(-1) if reduce == "mean" else terms.sum(-1)
    torch.testing.assert_close(found, terms[masked].mean())
    everywhere = hidden(batch, predict_at=None)
    torch.testing.assert_close(model.losses(everywhere, Draw(0), ["mrm"])["mrm"].loss, found)
    assert model.counts(batch, ["mrm"])["mrm"] == masked.sum()


def test_features_are_the_regions_own_where_nothing_else_is_said() -> None:
    model, batch = tiny(features=RegionTargetConfig(outputs=F_, losses=("mse",), tied=True))
    features = torch.randn(3, R, F_)
    batch = hidden(batch, features=features, targets={})
    masked = batch.images["masked"].masked
    found = model.losses(batch, Draw(0), ["mrm"])["mrm"].loss
    wanted = F.mse_loss(outputs_of(model, batch, "features")[masked], features[masked])
    torch.testing.assert_close(found, wanted)


def test_regions_that_are_predicted_may_show_their_features() -> None:
    """LXMERT leaves a tenth of them as they are: what is predicted is another thing than what is hidden."""
    model, batch = tiny(classes=RegionTargetConfig(outputs=7, losses=("best_class",)))
    target = torch.randn(3, R, 7).softmax(-1)
    predict = torch.arange(R).expand(3, R) == 4
    batch = hidden(batch, targets={"classes": target}, predict=predict, predict_at=None)
    found = model.losses(batch, Draw(0), ["mrm"])["mrm"].loss
    logits = outputs_of(model, batch, "classes")[predict]
    torch.testing.assert_close(found, F.cross_entropy(logits, target[predict][:, 1:].argmax(1) + 1))


def test_mean_over_all_regions_by_their_scores() -> None:
    target = RegionTargetConfig(outputs=7, losses=("class",), weight=6.667)
    config = MrmConfig(targets={"objects": target}, mean="all")
    model = model_of("UNITER", {"mlm": MlmConfig(), "mrm": config}).eval()
    objects, scores = torch.randint(7, (3, R)), torch.rand(3, R)
    batch = synthetic_batch(model, 3, 10, device="cpu")
    batch = hidden(batch, targets={"objects": objects, "objects_scores": scores})
    found = model.losses(batch, Draw(0), ["mrm"])["mrm"].loss
    terms = F.cross_entropy(outputs_of(model, batch, "objects").flatten(0, 1), objects.flatten(), reduction="none")
    torch.testing.assert_close(found, 6.667 * (terms * scores.flatten()).mean())
    assert model.counts(batch, ["mrm"])["mrm"] == 3 * R


def test_noise_contrast_finds_the_true_features() -> None:
    features = torch.randn(6, 4)
    outputs = torch.randn(2, 4)
    found = region_terms("nce", outputs, features[[1, 3]], features)
    wanted = F.cross_entropy(outputs @ features.T, torch.tensor([1, 3]), reduction="none")
    torch.testing.assert_close(found, wanted)
    doubled = torch.cat([features, features[1:2]])  # the same features again are not false
    torch.testing.assert_close(region_terms("nce", outputs[:1], features[1:2], doubled), wanted[:1])


def test_a_batch_without_hidden_regions_has_no_loss_but_a_gradient() -> None:
    model, batch = tiny(**CLASSES)
    none = torch.zeros(3, R, dtype=torch.bool)
    batch = hidden(batch, masked=none, predict_at=torch.full((8,), -1))
    loss = model.losses(batch, Draw(0), ["mrm"])["mrm"].loss
    loss.backward()
    assert loss == 0 and all(p.grad is not None for p in model.objectives["mrm"].parameters())


# Other heads


def test_given_pairs() -> None:
    model = model_of("UNITER", {"itm": ItmConfig(scheme="given")}).eval()
    batch = synthetic_batch(model, 4, 10, device="cpu")
    logits = model.objectives["itm"].head(model.run({Fuse()}, batch)[Fuse()].pooled)
    wanted = F.cross_entropy(logits, batch.targets["match"].long())
    torch.testing.assert_close(model.losses(batch, Draw(0))["itm"].loss, wanted)


@pytest.mark.parametrize("scheme", ["texts", "both", "given"])
def test_margin(scheme: Any) -> None:
    config = RankConfig(loss="margin", scheme=scheme, negatives=1, margin=0.3)
    model = model_of("UNITER", {"rank": config}).eval()
    batch = synthetic_batch(model, 4, 10, device="cpu")
    batch = replace(batch, texts={"clean": replace(batch.texts["clean"], ids=torch.randint(5, 50, (4, 10)))})
    rank = model.objectives["rank"]
    rows = rank.rows(None, batch, Draw(0)).get("rank")
    if scheme == "given":
        assert rows is None
        images, texts = torch.arange(4), torch.arange(4)
    else:
        images, texts = rows.image_index.view(4, -1), rows.text_index.view(4, -1)
        assert (images[:, 0] == texts[:, 0]).all() and (images[:, 1:] != texts[:, 1:]).all()
        assert (images[:, 1] == images[:, 0]).all() and (scheme == "texts" or (texts[:, 2] == texts[:, 0]).all())
    scores = []
    for image, text in zip(images.flatten().tolist(), texts.flatten().tolist(), strict=True):
        clean, words = batch.images["clean"], batch.texts["clean"]
        alone = Batch(
            {"clean": Regions(clean.features[[image]], clean.boxes[[image]])},
            {"clean": replace(words, ids=words.ids[[text]], keep=words.keep[[text]])},
        )
        scores.append(rank.score(model.run({Fuse()}, alone)[Fuse()].pooled)[0].sigmoid())
    table = torch.stack(scores).view(-1, 2 if scheme != "both" else 3)
    wanted = (0.3 + table[:, 1:] - table[:, :1]).clamp(min=0).mean()
    torch.testing.assert_close(model.losses(batch, Draw(0))["rank"].loss, wanted, rtol=1e-4, atol=1e-6)


def test_images_that_look_at_each_other() -> None:
    model = model_of("UNITER", {"relate": PairAttentionConfig(heads=4)}, images="each")
    batch = synthetic_batch(model, 4, 10, device="cpu")
    clean = batch.images["clean"]
    two = replace(
        batch,
        images={"clean": Regions(torch.randn(8, R, F_), torch.rand(8, R, 7), torch.rand(8, R) < 0.7)},
        image_of_text=torch.arange(8).view(4, 2),
        image_id=None,
    )
    loss, _ = model(two, Draw(0))
    loss.backward()
    complete(model.objectives["relate"])
    model.eval()
    logits = model.objectives["relate"].logits(model.run({Fuse()}, two)[Fuse()])
    assert logits.shape == (4, 2) and clean.features.shape[0] == 4
    swapped = model.run({Fuse()}, replace(two, image_of_text=two.image_of_text.flip(1)))[Fuse()]
    assert not torch.allclose(model.objectives["relate"].logits(swapped), logits)
    given = two.images["clean"]
    noise = torch.where(given.keep[..., None], given.features, torch.randn_like(given.features))
    padded = replace(two, images={"clean": replace(given, features=noise)})
    torch.testing.assert_close(model.objectives["relate"].logits(model.run({Fuse()}, padded)[Fuse()]), logits)


def test_answers_that_are_not_in_the_list_do_not_count() -> None:
    model = model_of("UNITER", {"answer": AnswerConfig(answers=ANSWERS, loss="ce", head="linear")}).eval()
    batch = synthetic_batch(model, 3, 10, device="cpu")
    scores = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 1.0]])
    batch = replace(batch, targets={"answer_scores": scores})
    logits = model.objectives["answer"].head(model.run({Fuse()}, batch)[Fuse()].pooled)
    wanted = F.cross_entropy(logits[[0, 2]], torch.tensor([0, 2]))
    torch.testing.assert_close(model.losses(batch, Draw(0))["answer"].loss, wanted)
    assert model.counts(batch)["answer"] == 2
