"""Words that carry the whole picture's feature, and regions whose boxes are sines and cosines (VL-BERT)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SIZES, VOCABULARY
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from encoders import RegionConfig, TextConfig
from encoders.region import box_waves
from encoders.types import Batch, Regions, Texts
from objectives import LmConfig
from objectives.base import Encode, Fuse, Rows
from vlp.fusion.single import SingleStreamConfig
from vlp.model import Model, ModelConfig, build_model

FEATURES, WAVES = 6, 3
VISION: dict[str, Any] = {
    **{"features": FEATURES, "boxes": 4, "width": 32, "number": 5, "geometry": "sinusoid", "wavelengths": WAVES},
    **{"merge": "norm_concat", "activation": "relu", "norm": "none", "segments": "text", "segment": 2, "word": True},
    **{"pool": "first", "mask_embedding": True},
}
TEXT: dict[str, Any] = {
    **{"width": 32, "heads": 4, "layers": 0, "segments": 3, "embed_norm": False},
    **{"vocabulary_size": VOCABULARY, "max_length": 16},
}
FUSION: dict[str, Any] = {**SIZES, "modality_embedding": False, "words_see": "image", "join_norm": True}


def model_of(**fusion: Any) -> Model:
    """With weights that are nowhere 0 or 1."""
    torch.manual_seed(0)
    config = ModelConfig(
        vision=RegionConfig(**VISION), text=TextConfig(**TEXT), fusion=SingleStreamConfig(**FUSION | fusion)
    )
    model = build_model(config, {}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def a_batch() -> Batch:
    low = torch.rand(2, 5, 2) / 2
    boxes = torch.cat([low, low + torch.rand(2, 5, 2) / 2], -1)
    masked = torch.tensor([[False, True, False, False, False], [False, False, False, True, True]])
    keep = torch.tensor([[True] * 5, [True, True, False, True, True]])
    ids = torch.randint(5, VOCABULARY, (3, 4))
    texts = Texts(ids, torch.tensor([[True] * 4, [True, True, True, False], [True] * 4]))
    regions = Regions(torch.randn(2, 5, FEATURES), boxes, keep, masked)
    return Batch({"clean": regions}, {"clean": texts}, image_of_text=torch.tensor([1, 0, 1]))


def seen(model: Model, regions: Regions) -> Tensor:
    """ReLU of one layer over feature and waves, [B, R, D]."""
    vision = model.vision
    features = torch.where(regions.masked[..., None], vision.mask, regions.features)
    waves = []
    for image in regions.boxes.tolist():
        for left, top, right, bottom in image:
            for value in ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top):
                angles = [100 * value / 1000 ** (k / WAVES) for k in range(WAVES)]
                waves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    table = torch.tensor(waves).view(*regions.boxes.shape[:2], 8 * WAVES)
    torch.testing.assert_close(box_waves(regions.boxes, WAVES), table, rtol=1e-4, atol=1e-4)
    return F.relu(F.linear(torch.cat([features, table], -1), vision.project.weight, vision.project.bias))


def words_of(model: Model, texts: Texts) -> Tensor:
    table = model.text.embeddings
    return table.word(texts.ids) + table.position.weight[: texts.ids.shape[1]] + table.segment.weight[0]


def through(model: Model, states: Tensor, keep: Tensor) -> Tensor:
    states = model.fusion.join_norm(states)
    for block in model.fusion.blocks:
        states = block(states, keep[:, None, None])
    return states


def test_a_pair_as_vl_bert_embeds_it() -> None:
    model, batch = model_of(), a_batch()
    regions, texts, index = batch.images["clean"], batch.texts["clean"], batch.image_of_text
    visual, vision = seen(model, regions), model.vision
    word = torch.where(regions.masked[..., None], vision.word.weight[1], vision.word.weight[0])
    image = vision.project_norm(visual) + word + model.text.embeddings.segment.weight[2]
    text = words_of(model, texts) + model.fusion.words_see.norm(visual[:, 0])[index][:, None]
    keep = torch.cat([regions.keep[index], texts.keep], 1)
    wanted = through(model, torch.cat([image[index], text], 1), keep)
    found = model.run({Fuse()}, batch)[Fuse()]
    torch.testing.assert_close(found.image.states, wanted[:, :5], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.text.states, wanted[:, 5:], rtol=1e-4, atol=1e-4)
    rows = Fuse(rows="other")
    pairs = {"other": Rows(torch.tensor([0, 1]), torch.tensor([2, 0]))}
    other = model.run({rows}, batch, rows=pairs)[rows]
    torch.testing.assert_close(other.text.states[1], found.text.states[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other.text.states[0], found.text.states[2], atol=1e-2), "it has another picture's vector"


@pytest.mark.parametrize("absent", [False, True])
def test_a_text_alone(absent: bool) -> None:
    model, batch = model_of(absent_image=absent), a_batch()
    texts = batch.texts["clean"]
    states = words_of(model, texts)
    if absent:
        states = states + model.fusion.words_see.norm(model.fusion.words_see.absent)
    found = model.run({Encode("text")}, Batch(texts=batch.texts))[Encode("text")]
    torch.testing.assert_close(found.states, through(model, states, texts.keep), rtol=1e-4, atol=1e-4)


def test_it_starts_as_the_bert_that_it_is_made_of(tmp_path: Path) -> None:
    """With norms that start at 0 the picture is not seen; BERT's embedding norm is the joined one."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = BertModel(BertConfig(vocab_size=VOCABULARY, intermediate_size=128, **sizes)).eval()
    with torch.no_grad():
        bert.embeddings.LayerNorm.weight.normal_(1, 0.3)
    bert.save_pretrained(tmp_path)
    config = ModelConfig(
        vision=RegionConfig(**VISION),
        text=TextConfig(**TEXT, init=str(tmp_path)),
        fusion=SingleStreamConfig(**FUSION, words_see_start=0.0, init=str(tmp_path)),
    )
    model, batch = build_model(config, {}, pretrained=True).eval(), a_batch()
    texts = batch.texts["clean"]
    with torch.no_grad():
        wanted = bert(texts.ids, texts.keep.long()).last_hidden_state
        found = model.run({Encode("text")}, Batch(texts=batch.texts))[Encode("text")].states
        torch.testing.assert_close(found[texts.keep], wanted[texts.keep], rtol=1e-4, atol=1e-5)
        carried = model.fusion.words_see(model.vision(batch.images["clean"]), model.text(texts), batch.image_of_text)
    assert carried.shape == (3, 1, 32) and not carried.any()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lays two behind each other; use images each"):
        model_of(images="pair")
    with pytest.raises(ValueError, match=r"set model\.fusion\.words_see to image, or absent_image to false"):
        model_of(words_see="none", absent_image=True)
    with pytest.raises(ValueError, match=r"model\.vision\.boxes is 5; set it to 4, or use geometry values"):
        RegionConfig(**VISION | {"boxes": 5}).build()
    vision, text, fusion = RegionConfig(**VISION), TextConfig(**TEXT), SingleStreamConfig(**FUSION)
    with pytest.raises(ValueError, match="use single_stream with words_see none"):
        build_model(ModelConfig(vision=vision, text=text, fusion=fusion), {"lm": LmConfig(memory="beside")})
