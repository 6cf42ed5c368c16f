"""transformers' BLIP classes at random sizes, saved, loaded here, and compared: states, losses, written ids."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from standins import GOLDENS, verdict
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    PreTrainedModel,
)

import vlp
from encoders.types import Batch, Images, Texts, Vocabulary
from objectives.base import Decode, Draw, Embed, Encode, Fuse
from scripts.goldens.base import Case
from vlp.checkpoint.export import convert
from vlp.generate import GenerationConfig, generate_text
from vlp.loaded import Loaded

SEEDS = range(4)
WORDS, BOS, SEP = 60, 58, 3
VOCABULARY = Vocabulary(WORDS, 0, 2, SEP, None, BOS, SEP)
IMAGE, TEXT, ANSWERS = Encode("image"), Encode("text"), "lm:answer"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published tokenizers are not looked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["hf_blip_caption", "hf_blip_itm"])
def test_recorded(name: str) -> None:
    found = verdict(Case(GOLDENS / name))
    assert found.passed, found.line()


def config(seed: int) -> BlipConfig:
    """Random sizes, activations and epsilons."""
    draw = random.Random(seed)
    width, heads = draw.choice([(16, 2), (24, 4), (32, 8)])
    vision, vision_heads = draw.choice([(16, 4), (24, 2), (40, 8)])
    patch = draw.choice([4, 8])
    activations = ["gelu", "gelu_pytorch_tanh", "quick_gelu"]
    return BlipConfig(
        text_config={
            "vocab_size": WORDS,
            "hidden_size": width,
            "encoder_hidden_size": vision,
            "intermediate_size": draw.choice([20, 48]),
            "num_hidden_layers": draw.choice([1, 3]),
            "num_attention_heads": heads,
            "max_position_embeddings": 24,
            "hidden_act": draw.choice(activations),
            "layer_norm_eps": draw.choice([1e-12, 1e-3]),
            "bos_token_id": BOS,
            "eos_token_id": 2,
            "sep_token_id": SEP,
            "label_smoothing": draw.choice([0.0, 0.1]),
        },
        vision_config={
            "hidden_size": vision,
            "intermediate_size": draw.choice([28, 64]),
            "num_hidden_layers": draw.choice([1, 2]),
            "num_attention_heads": vision_heads,
            "image_size": patch * draw.choice([2, 3]),
            "patch_size": patch,
            "hidden_act": draw.choice(activations),
            "layer_norm_eps": draw.choice([1e-6, 1e-3]),
        },
        image_text_hidden_size=draw.choice([8, 12]),
    )


def pair(kind: Any, settings: BlipConfig, folder: Path, seed: int) -> tuple[Any, Loaded]:
    """A model of transformers with noise for weights, and what we load of it."""
    torch.manual_seed(seed)
    if kind is BlipForQuestionAnswering:
        settings.text_config.encoder_hidden_size = settings.vision_config.hidden_size
        # Their decoder reads the question's states with the width of the images'.
        settings.text_config.hidden_size = settings.vision_config.hidden_size
        settings.text_config.num_attention_heads = settings.vision_config.num_attention_heads
    theirs: PreTrainedModel = kind(settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
        if hasattr(theirs, "text_decoder"):
            theirs.text_decoder.cls.predictions.bias[SEP] += 2.0  # some texts are to end before the limit
    theirs.save_pretrained(folder)
    return theirs, vlp.load(folder)


def texts(number: int, length: int, first: int = 2) -> Texts:
    lengths = torch.randint(4, length + 1, (number,))
    lengths[0] = length
    keep = torch.arange(length) < lengths[:, None]
    ids = torch.randint(5, BOS, (number, length)).masked_fill(~keep, 0)
    ids[:, 0] = first
    return Texts(ids.scatter(1, lengths[:, None] - 1, SEP), keep)


def labelled(text: Texts, known: int = 1) -> tuple[Texts, Tensor]:
    """The causal view, and transformers' labels, which are not shifted."""
    theirs = torch.where(text.keep & (torch.arange(text.ids.shape[1]) >= known), text.ids, -100)
    labels = theirs.roll(-1, 1)
    labels[:, -1] = -100
    return replace(text, attention="causal", labels=labels), theirs


def pixels(settings: BlipConfig) -> Tensor:
    side = settings.vision_config.image_size
    return torch.randn(3, 3, side, side)


def close(found: Tensor, wanted: Tensor, keep: Tensor | None = None) -> None:
    if keep is not None:
        found, wanted = found[keep], wanted[keep]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


GENERATION = [
    ({}, {"do_sample": False, "num_beams": 1}),
    ({"method": "beam"}, {"num_beams": 3, "do_sample": False}),
    (
        {"method": "beam", "beams": 2, "min_length": 6, "repetition_penalty": 1.4},
        {"num_beams": 2, "min_length": 6, "repetition_penalty": 1.4, "do_sample": False},
    ),
]


def unpadded(ids: Tensor) -> list[list[int]]:
    """Ids up to the first end behind the first id."""
    rows = []
    for row in ids.tolist():
        end = row.index(SEP, 1) + 1 if SEP in row[1:] else len(row)
        rows.append(row[:end])
    return rows


@pytest.mark.parametrize("seed", SEEDS)
def test_captioning(tmp_path: Path, seed: int) -> None:
    settings = config(seed)
    theirs, loaded = pair(BlipForConditionalGeneration, settings, tmp_path, seed)
    images, text = pixels(settings), texts(3, 9, BOS)
    view, labels = labelled(text, known=2)
    wanted = theirs(images, text.ids, text.keep.long(), labels=labels)
    batch = Batch({"clean": Images(images)}, {"clean": text, "causal": view})
    found = loaded.model.run({Decode(IMAGE)}, batch)
    close(found[IMAGE].states, wanted.image_embeds)
    close(loaded.model.objectives["lm"].head(found[Decode(IMAGE)].states), wanted.logits, text.keep)
    close(loaded.model.losses(batch, Draw(0))["lm"].loss, wanted.loss)
    for ours, given in GENERATION:
        length = GenerationConfig(**ours, max_length=12)
        ids, _ = generate_text(loaded.model, found[IMAGE], VOCABULARY, length)
        assert ids == unpadded(theirs.generate(images, max_length=12, **given))
        prompt = text.ids[:, :3]
        ids, _ = generate_text(loaded.model, found[IMAGE], VOCABULARY, length, prompt)
        dropped = torch.cat([prompt, prompt[:, :1]], 1)  # transformers drops the last id
        reached = theirs.generate(images, input_ids=dropped, max_length=12, **given)
        assert ids == unpadded(reached)


@pytest.mark.parametrize("seed", SEEDS)
def test_matching(tmp_path: Path, seed: int) -> None:
    settings = config(seed)
    theirs, loaded = pair(BlipForImageTextRetrieval, settings, tmp_path, seed)
    images, text = pixels(settings), texts(3, 9)
    batch = Batch({"clean": Images(images)}, {"clean": text})
    found = loaded.model.run({Fuse(), TEXT, Embed("image"), Embed("text")}, batch)
    matched = theirs(text.ids, images, attention_mask=text.keep.long())
    close(found[Fuse()].text.states, matched.question_embeds, text.keep)
    close(loaded.model.objectives["itm"].head(found[Fuse()].pooled), matched.itm_score)
    alone = theirs(text.ids, images, use_itm_head=False, attention_mask=text.keep.long())
    close(found[TEXT].states, alone.question_embeds, text.keep)
    close(found[Embed("image")] @ found[Embed("text")].T, alone.itm_score)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("padded", [False, True])
def test_questions(tmp_path: Path, seed: int, padded: bool) -> None:
    settings = config(seed)
    theirs, loaded = pair(BlipForQuestionAnswering, settings, tmp_path, seed)
    images, question, answer = pixels(settings), texts(3, 9), texts(3, 6, BOS)
    if padded:  # transformers 5 leaves the mask out where its decoder reads the question
        loaded = vlp.load(tmp_path, settings={"model": {"decoder": {"reads_padding": True}}})
    else:
        question = replace(question, ids=question.ids.clamp(min=5), keep=torch.ones_like(question.keep))
    view, labels = labelled(answer)
    wanted = theirs(
        question.ids,
        images,
        decoder_input_ids=answer.ids,
        decoder_attention_mask=answer.keep.long(),
        attention_mask=question.keep.long(),
        labels=labels,
    )
    batch = Batch({"clean": Images(images)}, {"clean": question, ANSWERS: view})
    found = loaded.model.run({Decode(Fuse(), ANSWERS)}, batch)
    close(
        found[IMAGE].states if IMAGE in found else loaded.model.run({IMAGE}, batch)[IMAGE].states, wanted.image_embeds
    )
    close(loaded.model.losses(batch, Draw(0))["lm"].loss, wanted.loss)
    memory = found[Fuse()].text
    for ours, given in GENERATION:
        ids, _ = generate_text(loaded.model, memory, VOCABULARY, GenerationConfig(**ours, max_length=10))
        reached = theirs.generate(question.ids, images, question.keep.long(), max_length=10, **given)
        assert ids == unpadded(reached)


@pytest.mark.parametrize("kind", [BlipForConditionalGeneration, BlipForQuestionAnswering])
def test_files_of_transformers_4(tmp_path: Path, kind: Any) -> None:
    """They hold tied weights twice, and counted positions."""
    _, loaded = pair(kind, config(1), tmp_path / "new", 1)
    state = load_file(tmp_path / "new" / "model.safetensors")
    head, stack = "text_decoder.cls.predictions.", "text_decoder.bert.embeddings."
    state[head + "decoder.weight"] = state[stack + "word_embeddings.weight"].clone()
    state[head + "decoder.bias"] = state[head + "bias"].clone()
    state[stack + "position_ids"] = torch.arange(24)[None]
    (tmp_path / "old").mkdir()
    save_file(state, tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    old = vlp.load(tmp_path / "old")
    assert len(old.report.ignored) == 3
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, old.model.state_dict()[name]), name


def test_output_words_of_their_own(tmp_path: Path) -> None:
    settings = config(2)
    settings.tie_word_embeddings = settings.text_config.tie_word_embeddings = False
    theirs, loaded = pair(BlipForConditionalGeneration, settings, tmp_path, 2)
    images, text = pixels(settings), texts(3, 9, BOS)
    view, _ = labelled(text)
    found = loaded.model.run({Decode(IMAGE)}, Batch({"clean": Images(images)}, {"causal": view}))
    logits = loaded.model.objectives["lm"].head(found[Decode(IMAGE)].states)
    close(logits, theirs(images, text.ids, text.keep.long()).logits, text.keep)
    assert not loaded.config.objectives["lm"].tied


def test_sizes_are_assumed_without_a_configuration(tmp_path: Path) -> None:
    pair(BlipForImageTextRetrieval, config(0), tmp_path, 0)
    (tmp_path / "config.json").unlink()
    file = (tmp_path / "model.safetensors").rename(tmp_path / "blip.safetensors")  # the other name is our own's
    notes = vlp.load(file).report.notes
    assert any("no config.json: 2 heads" in note or "no config.json: 1 heads" in note for note in notes)


def weights(theirs: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in theirs.state_dict().items() if "position_ids" not in name}


@pytest.mark.parametrize("kind", [BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering])
@pytest.mark.parametrize("seed", SEEDS)
def test_back(tmp_path: Path, kind: Any, seed: int) -> None:
    theirs, loaded = pair(kind, config(seed), tmp_path / "there", seed)
    left = convert(loaded, tmp_path / "back", "hf")
    assert set(left) <= {"embed.main.logit_scale"}
    back = kind.from_pretrained(tmp_path / "back").eval()
    wanted = weights(theirs)
    assert weights(back).keys() == wanted.keys()
    for name, tensor in weights(back).items():
        assert torch.equal(tensor, wanted[name]), name
    for part in ("text_config", "vision_config"):
        ours, original = (getattr(one.config, part).to_dict() for one in (back, theirs))
        unknown = {"bos_token_id", "sep_token_id", "eos_token_id"}  # the tokenizer is not here
        unread = {"dtype", "initializer_range", "projection_dim"}
        unread |= {"label_smoothing"} if kind is BlipForImageTextRetrieval else set()
        for name in original.keys() - unknown - unread:
            assert ours[name] == original[name], name


@pytest.mark.parametrize("case", ["blip_decoder", "blip_itm", "blip_pretrain", "by_blip_code/blip_vqa_train"])
def test_the_authors_files_reach_transformers(tmp_path: Path, case: str) -> None:
    recorded = Case(GOLDENS / case)
    given = {"vit": recorded.config["vit"], "med_config": recorded.config["med"]}
    loaded = vlp.load(recorded.weights, config=given)
    convert(loaded, tmp_path / "out", "hf")
    named = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"][0]
    theirs = getattr(transformers, named).from_pretrained(tmp_path / "out").eval()
    image = recorded.inputs["image"]
    if named == "BlipForConditionalGeneration":
        ids, keep = recorded.inputs["text.input_ids"].clone(), recorded.inputs["text.attention_mask"]
        ids[:, 0] = theirs.config.text_config.bos_token_id
        close(theirs(image, ids, keep).logits, recorded.outputs["lm_logits"], keep.bool())
    elif named == "BlipForImageTextRetrieval":
        ids, keep = recorded.inputs["text.input_ids"], recorded.inputs["text.attention_mask"]
        close(theirs(ids, image, attention_mask=keep).itm_score, recorded.outputs["itm_logits"])
    else:
        ids, keep = recorded.inputs["question.input_ids"].clone(), recorded.inputs["question.attention_mask"]
        ids[:, 0] = loaded.config.model.text.fused_first
        seen = theirs.vision_model(image).last_hidden_state
        states = theirs.text_encoder(ids, keep, encoder_hidden_states=seen).last_hidden_state
        close(states, recorded.outputs["question_states"], keep.bool())


def test_what_transformers_cannot_hold(tmp_path: Path) -> None:
    recorded = Case(GOLDENS / "albef_retrieval")
    with pytest.raises(ValueError, match="hf_blip: its text encoder is not BLIP's"):
        convert(vlp.load(recorded.weights, config=recorded.config), tmp_path / "out", "hf")
