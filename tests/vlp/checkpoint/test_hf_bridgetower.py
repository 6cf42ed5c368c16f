"""transformers' BridgeTower: the recorded case, and its own classes at random sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from standins import GOLDENS, verdict
from torch import Tensor
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerModel,
)
from two_towers import randomise, texts, write_case

import vlp
from scripts.goldens.base import Case

CLASSES = {
    "hf_bridgetower": BridgeTowerModel,
    "hf_bridgetower_itc": BridgeTowerForContrastiveLearning,
    "hf_bridgetower_itm": BridgeTowerForImageAndTextRetrieval,
    "hf_bridgetower_mlm": BridgeTowerForMaskedLM,
}
TEXT = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 99}
TEXT |= {"max_position_embeddings": 20, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES: list[dict[str, Any]] = [
    {"layers": 2, "fusion": 1, "vision": {"hidden_size": 64, "patch_size": 8, "image_size": 24}},
    {"layers": 3, "fusion": 2, "vision": {"hidden_size": 128, "patch_size": 4, "image_size": 16},
     "link_tower_type": "scaled_add", "text": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-12}},
    {"layers": 3, "fusion": 3, "vision": {"hidden_size": 64, "patch_size": 8, "image_size": 16, "layer_norm_eps": 1e-4},
     "link_tower_type": "interpolate", "layer_norm_eps": 1e-6, "hidden_act": "relu"},
]  # fmt: skip


def test_recorded() -> None:
    found = verdict(Case(GOLDENS / "hf_bridgetower_itc"))
    assert found.passed, found.line()
    assert found.compared > 0.8 * found.recorded, "the rest is padding"


def build(name: str, number: int, **more: Any) -> Any:
    sizes = dict(SIZES[number])
    layers, fusion, vision = (sizes.pop(key) for key in ("layers", "fusion", "vision"))
    if name == "hf_bridgetower_itc":  # where transformers wants one width
        vision = {**vision, "hidden_size": 64}
    config = BridgeTowerConfig(
        text_config={**TEXT, "num_hidden_layers": layers, **sizes.pop("text", {})},
        vision_config={"num_hidden_layers": layers, **vision},
        hidden_size=64,
        num_hidden_layers=fusion,
        contrastive_hidden_size=16,
        logit_scale_init_value=2.6592,
        **sizes,
        **more,
    )
    model = randomise(CLASSES[name](config), number)
    with torch.no_grad():
        for part, one in model.named_parameters():
            if part.endswith(("scaled_factor", "beta")):
                one.fill_(0.3)
    return model


def inputs(name: str, model: Any, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, keep = texts(3, 10, pad=1, end=2, seed=seed)
    side = model.config.vision_config.image_size
    given = {"input_ids": ids, "attention_mask": keep}
    given["pixel_values"] = torch.randn(3, 3, side, side, generator=generator)
    if name == "hf_bridgetower_mlm":
        given["labels"] = ids.where((torch.arange(10) % 3 == 1) & (keep == 1), -100)
    if name == "hf_bridgetower_itm":
        given["labels"] = torch.tensor([1, 0, 1])
    return given


def reference_case(folder: Path, name: str, model: Any, given: dict[str, Tensor]) -> Case:
    """What transformers says of these inputs, as a case."""
    if name == "hf_bridgetower":
        found = model(**given, output_hidden_states=True)
        text, image, cross = found.hidden_states
        outputs = {"text_features": found.text_features, "image_features": found.image_features}
        outputs |= {f"text_hidden_states.{n}": x for n, x in enumerate(text)}
        outputs |= {f"image_hidden_states.{n}": x for n, x in enumerate(image)}
        for n, (one, other) in enumerate(cross):
            outputs |= {f"cross_text.{n}": one, f"cross_image.{n}": other}
        outputs["pooler_output"] = found.pooler_output
        case = write_case(folder, given, outputs, found.pooler_output.sum(), model)
        (folder / "grad_norms.json").unlink()
        return case
    contrast = {"return_loss": True} if name == "hf_bridgetower_itc" else {}
    found = model(**given, **contrast)
    outputs = {"loss": found.loss, "logits": found.logits}
    if contrast:
        outputs |= {key: getattr(found, key) for key in ("text_embeds", "image_embeds", "cross_embeds")}
    return write_case(folder, given, outputs, found.loss, model)


@pytest.mark.parametrize("number", range(len(SIZES)))
@pytest.mark.parametrize("name", CLASSES)
def test_in(tmp_path: Path, name: str, number: int) -> None:
    model, folder = build(name, number), tmp_path / name
    model.save_pretrained(folder)
    found = verdict(reference_case(folder, name, model, inputs(name, model, number)))
    assert found.passed, found.line()
    assert found.compared > 0.6 * found.recorded
    assert name == "hf_bridgetower" or found.gradients > 50


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.endswith("itc")])  # which transformers cannot
def test_a_projection_for_each_layer(tmp_path: Path, name: str) -> None:
    model, folder = build(name, 1, share_cross_modal_transformer_layers=False), tmp_path / name
    model.save_pretrained(folder)
    found = verdict(reference_case(folder, name, model, inputs(name, model, 1)))
    assert found.passed, found.line()


def test_what_vlp_does_not_read(tmp_path: Path) -> None:
    model = build("hf_bridgetower", 1)
    model.config.share_link_tower_layers = True
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="share_link_tower_layers true"):
        vlp.load(tmp_path)
