"""transformers' ViLT: recorded cases, and its own classes at random sizes, in and out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from standins import GOLDENS, verdict
from torch import Tensor
from transformers import (
    BertTokenizer,
    ViltConfig,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltImageProcessorPil,
    ViltModel,
    ViltProcessor,
)
from two_towers import randomise, texts, write_case

import vlp
from scripts.goldens.base import Case
from vlp.checkpoint.export import convert

RECORDED = ["hf_vilt", "hf_vilt_mlm", "hf_vilt_vqa"]
SIZES: list[dict[str, Any]] = [
    {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "patch_size": 8, "image_size": 48},
    {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 4, "image_size": 20,
     "hidden_act": "quick_gelu", "layer_norm_eps": 1e-6, "type_vocab_size": 3},
    {"hidden_size": 32, "num_attention_heads": 8, "num_hidden_layers": 3, "patch_size": 16, "image_size": 64,
     "hidden_act": "gelu_new", "intermediate_size": 50, "max_position_embeddings": 12},
]  # fmt: skip
CLASSES = {
    "hf_vilt": ViltModel,
    "hf_vilt_mlm": ViltForMaskedLM,
    "hf_vilt_vqa": ViltForQuestionAnswering,
    "hf_vilt_itr": ViltForImageAndTextRetrieval,
    "hf_vilt_nlvr2": ViltForImagesAndTextClassification,
}
WORDS = 99


@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name: str) -> None:
    found = verdict(Case(GOLDENS / name))
    assert found.passed, found.line()
    assert found.compared > 0.7 * found.recorded, "the rest is padding"


@pytest.fixture(autouse=True)
def patches_in_order() -> Iterator[None]:
    """transformers draws the order of the patches."""

    def first(weights: Tensor, number: Any, replacement: bool = False) -> Tensor:
        return torch.arange(int(number)) % len(weights)

    with mock.patch.object(torch, "multinomial", first):
        yield


def build(name: str, sizes: dict[str, Any], seed: int) -> Any:
    more = {"modality_type_vocab_size": 3, "num_images": 2} if name == "hf_vilt_nlvr2" else {}
    labels = {"hf_vilt_vqa": [f"answer {n}" for n in range(7)], "hf_vilt_nlvr2": ["False", "True"]}.get(name)
    config = ViltConfig(
        **{"vocab_size": WORDS, "intermediate_size": 40, "max_position_embeddings": 16, **sizes, **more},
        **({} if labels is None else {"id2label": dict(enumerate(labels))}),
    )
    return randomise(CLASSES[name](config), seed)


def inputs(name: str, config: ViltConfig, seed: int) -> dict[str, Tensor]:
    """Texts and images of unlike sizes, some larger than those the positions are of."""
    generator = torch.Generator().manual_seed(seed)
    ids, keep = texts(3, 10, pad=0, end=98, seed=seed)
    images, side = 6 if name == "hf_vilt_nlvr2" else 3, config.patch_size
    grids = torch.randint(1, 7, (images, 2), generator=generator)
    grids[0] = torch.tensor([6, 5])
    height, width = (grids.max(0).values * side).tolist()
    mask = torch.zeros(images, height, width, dtype=torch.long)
    for row, (rows, columns) in enumerate(grids.tolist()):
        mask[row, : rows * side, : columns * side] = 1
    pixels = torch.randn(images, 3, height, width, generator=generator) * mask[:, None]
    if name == "hf_vilt_nlvr2":
        pixels, mask = pixels.unflatten(0, (3, 2)), mask.unflatten(0, (3, 2))
    segments = torch.randint(0, config.type_vocab_size, ids.shape, generator=generator)
    given = {"input_ids": ids, "attention_mask": keep, "token_type_ids": segments}
    given |= {"pixel_values": pixels, "pixel_mask": mask}
    if name == "hf_vilt_mlm":
        given["labels"] = ids.where((torch.arange(10) % 3 == 1) & (keep == 1), -100)
    if name == "hf_vilt_vqa":
        given["labels"] = torch.rand(3, 7, generator=generator)
    if name == "hf_vilt_nlvr2":
        given["labels"] = torch.tensor([1, 0, 1])
    return given


def reference_case(folder: Path, name: str, model: Any, given: dict[str, Tensor]) -> Case:
    """What transformers says of these inputs, as a case."""
    found = model(**given, output_hidden_states=name == "hf_vilt")
    if name == "hf_vilt":
        image = given["pixel_mask"][:, :: model.config.patch_size, :: model.config.patch_size].flatten(1)
        image = image.sort(descending=True, stable=True).values[:, : int(image.sum(1).max())]
        joint = torch.cat([given["attention_mask"], torch.ones_like(image[:, :1]), image], 1)
        outputs = {"last_hidden_state": found.last_hidden_state, "pooler_output": found.pooler_output}
        outputs |= {"joint_mask": joint} | {f"hidden_states.{n}": x for n, x in enumerate(found.hidden_states)}
        loss = found.pooler_output.square().sum() * 0
    else:
        outputs = {"logits": found.logits} | ({"loss": found.loss} if "labels" in given else {})
        loss = found.logits.sum() * 0 if found.loss is None else found.loss
    case = write_case(folder, given, outputs, loss, model, {"reference": type(model).__name__})
    if "loss" not in outputs:
        (folder / "grad_norms.json").unlink()
    return case


@pytest.mark.parametrize("sizes", range(len(SIZES)))
@pytest.mark.parametrize("name", CLASSES)
def test_in(tmp_path: Path, name: str, sizes: int) -> None:
    model = build(name, SIZES[sizes], seed=sizes)
    folder = tmp_path / name
    model.save_pretrained(folder)
    found = verdict(reference_case(folder, name, model, inputs(name, model.config, seed=sizes)))
    assert found.passed, found.line()
    assert found.compared > 0.3 * found.recorded


def test_what_transformers_4_stored(tmp_path: Path) -> None:
    """Buffers, and the bias of the words twice; words of their own, as the authors' were."""
    model = build("hf_vilt_mlm", SIZES[0], 0)
    model.save_pretrained(tmp_path)
    before = vlp.load(tmp_path).model.state_dict()
    state = load_file(tmp_path / "model.safetensors")
    state["vilt.embeddings.text_embeddings.position_ids"] = torch.arange(16)[None]
    state["mlm_score.bias"] = state["mlm_score.decoder.bias"].clone()
    words = state["vilt.embeddings.text_embeddings.word_embeddings.weight"]
    state["mlm_score.decoder.weight"] = words.flip(0).contiguous()
    save_file(state, tmp_path / "model.safetensors")
    loaded = vlp.load(tmp_path)
    assert {name.split(" ")[0] for name in loaded.report.ignored} == {
        "vilt.embeddings.text_embeddings.position_ids", "mlm_score.bias",
        "vilt.pooler.dense.weight", "vilt.pooler.dense.bias",
    }  # fmt: skip
    after = loaded.model.state_dict()
    assert torch.equal(after["objectives.mlm.head.decoder.weight"], words.flip(0))
    changed = "objectives.mlm.head.decoder.weight"
    assert all(torch.equal(after[name], one) for name, one in before.items() if name != changed)


def test_labels_are_answers(tmp_path: Path) -> None:
    build("hf_vilt_vqa", SIZES[0], 0).save_pretrained(tmp_path)
    assert vlp.load(tmp_path).config.objectives["answer"].answers == tuple(f"answer {n}" for n in range(7))


def test_labels_that_transformers_made_up_are_none(tmp_path: Path) -> None:
    build("hf_vilt_nlvr2", SIZES[0], 0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}))
    assert vlp.load(tmp_path).config.objectives["relate"].answers == ("False", "True")


def test_queries_without_bias_are_refused(tmp_path: Path) -> None:
    build("hf_vilt", SIZES[0] | {"qkv_bias": False}, 0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="qkv_bias false"):
        vlp.load(tmp_path)


def processor(folder: Path) -> ViltProcessor:
    """Images to a shorter side of 64 pixels, words of a vocabulary of 99; written to the folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "red", "a", "dog", "what", "?"]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"word{n}" for n in range(WORDS - len(words)))]))
    made = ViltProcessor(
        ViltImageProcessorPil(size={"shortest_edge": 64}, size_divisor=32), BertTokenizer(str(folder / "vocab.txt"))
    )
    made.save_pretrained(folder)
    return made


PICTURES = [
    Image.effect_mandelbrot(size, (-2, -1, 1, 1), 40).convert("RGB") for size in ((90, 52), (60, 88), (200, 64))
]
LARGE = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "patch_size": 32, "image_size": 64}


@pytest.mark.parametrize("name", ["hf_vilt_vqa", "hf_vilt_itr"])
def test_from_pictures_and_words(tmp_path: Path, name: str) -> None:
    """Their processor and model, and ours: pictures of any size in one batch."""
    model, texts = build(name, LARGE, 3), ["what is it ?", "a red dog", "word3 word4 word5 is red"]
    model.save_pretrained(tmp_path)
    given = processor(tmp_path)(PICTURES, texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**given).logits
    loaded = vlp.load(tmp_path)
    assert not any("preprocessor" in note for note in loaded.report.notes)
    if name == "hf_vilt_vqa":
        assert loaded.answer(PICTURES, texts) == [model.config.id2label[int(n)] for n in logits.argmax(1)]
    else:
        torch.testing.assert_close(loaded.match(PICTURES, texts), logits[:, 0].sigmoid(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_out(tmp_path: Path, name: str) -> None:
    """What came in goes out, and gives transformers what it gave before."""
    model = build(name, SIZES[0], 5)
    model.save_pretrained(tmp_path / "theirs")
    left = convert(vlp.load(tmp_path / "theirs"), tmp_path / "ours", "hf")
    again, told = CLASSES[name].from_pretrained(tmp_path / "ours", output_loading_info=True)
    unread = {"vilt.pooler.dense.weight", "vilt.pooler.dense.bias"} if name == "hf_vilt_mlm" else set()
    assert set(told["missing_keys"]) == unread and not told["unexpected_keys"] and not left
    given = inputs(name, model.config, 5)
    with torch.no_grad():
        wanted, found = model(**given), again.eval()(**given)
    key = "last_hidden_state" if name == "hf_vilt" else "logits"
    assert torch.equal(found[key], wanted[key])
    assert again.config.id2label == model.config.id2label or "labels" not in given


def test_out_of_the_authors(tmp_path: Path) -> None:
    """Pretraining has two heads, of which transformers' class holds one; its words are its own."""
    loaded = vlp.load(GOLDENS / "vilt_infer" / "model.ckpt", config={"num_heads": 4})
    left = convert(loaded, tmp_path / "ours", "hf")
    assert {name.split(".")[1] for name in left} == {"itm"}
    again = ViltForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    assert again.config.layer_norm_eps == 1e-6
    case = Case(GOLDENS / "vilt_mlm")
    pixels = case.inputs["image.0"]
    with torch.no_grad():
        logits = again(
            input_ids=case.inputs["text_ids_mlm"],
            attention_mask=case.inputs["text_masks"],
            pixel_values=pixels,
            pixel_mask=(pixels != 0).any(1).long(),
        ).logits
    keep = case.inputs["text_masks"].bool()
    # The one epsilon of transformers shows on these small embeddings.
    torch.testing.assert_close(logits[keep], case.outputs["mlm_logits"][keep], atol=2e-3, rtol=1e-2)


def test_what_has_no_such_form(tmp_path: Path) -> None:
    loaded = vlp.load(
        GOLDENS / "meter_infer" / "model.ckpt", config={"num_heads": 4, "vision_heads": 4, "text_heads": 4}
    )
    with pytest.raises(ValueError, match="hf_vilt: it is a single_stream with pooler tanh"):
        convert(loaded, tmp_path / "out", "hf")
