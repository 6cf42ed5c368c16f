"""transformers' GIT: models built here at random sizes, and what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from standins import verdict
from torch import Tensor
from two_towers import WORDS, randomise, texts, write_case

import vlp
from encoders.types import Batch, Images
from objectives.base import Encode
from scripts.goldens.base import Case
from vlp.generate import FusedStepper, GenerationConfig, generate, writer_of

SIZES: list[dict[str, Any]] = [
    {},
    {"text": {"hidden_act": "relu", "layer_norm_eps": 1e-3}, "vision": {"hidden_act": "gelu", "patch_size": 16}},
    {"text": {"hidden_size": 32, "num_attention_heads": 8, "tie_word_embeddings": True}, "vision": {"image_size": 48}},
    {"vision": {"hidden_size": 24, "layer_norm_eps": 1e-2}, "text": {"intermediate_size": 50, "num_hidden_layers": 2}},
]


def build(seed: int) -> Any:
    stack = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = stack | {"hidden_size": 32, "image_size": 32, "patch_size": 8} | SIZES[seed].get("vision", {})
    text = stack | {"vocab_size": WORDS, "max_position_embeddings": 16, "pad_token_id": 0}
    text |= {"bos_token_id": 97, "eos_token_id": 98, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.GitConfig(vision_config=vision, **(text | SIZES[seed].get("text", {})))
    return randomise(transformers.GitForCausalLM._from_config(config, attn_implementation="eager"), seed)


def run(model: Any, folder: Path, seed: int, prompt: int = 0) -> Case:
    """What a model says and writes, as a case."""
    model.save_pretrained(folder)
    ids, keep = texts(3, 10, pad=0, end=98, seed=seed)
    ids[:, 0] = 97
    side = model.config.vision_config.image_size
    given: dict[str, Tensor] = {"input_ids": ids, "attention_mask": keep, "labels": ids.masked_fill(keep == 0, -100)}
    given["pixel_values"] = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(seed))
    found = model(**given, output_hidden_states=True)
    begin = {"input_ids": ids[:, :prompt]} if prompt else {}
    written = model.generate(pixel_values=given["pixel_values"], max_length=9, do_sample=False, **begin)
    outputs = {
        "loss": found.loss,
        "logits": found.logits,
        "vision_last_hidden_state": model.git.image_encoder(given["pixel_values"]).last_hidden_state,
        "greedy_ids": written,
    }
    outputs |= {f"hidden_states.{n}": one for n, one in enumerate(found.hidden_states)}
    return write_case(folder, given, outputs, found.loss, model)


@pytest.mark.parametrize("seed", range(len(SIZES)))
def test_random(seed: int, tmp_path: Path) -> None:
    found = verdict(run(build(seed), tmp_path / "hf_git", seed, prompt=2 * (seed % 2)))
    assert found.passed, found.line()
    assert found.gradients > 60


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_writing_step_by_step(method: Any, tmp_path: Path) -> None:
    """With keys and values remembered, and reading everything again: the same."""
    build(0).save_pretrained(tmp_path)
    ours = vlp.load(tmp_path).model
    memory = ours.run([Encode("image")], Batch({"clean": Images(torch.randn(2, 3, 32, 32))}))[Encode("image")]
    decoder, writer = writer_of(ours, None)
    assert decoder is None
    found = []
    for cached in (True, False):
        stepper = FusedStepper(ours, writer.head, memory, torch.tensor([1, 0, 1]), use_cache=cached)
        settings = GenerationConfig(method=method, max_length=12)
        found.append(generate(stepper, torch.full((3, 1), 97), settings, eos=98, pad=0))
    assert torch.equal(found[0].ids, found[1].ids)
    torch.testing.assert_close(found[0].scores, found[1].scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0].ids[0], found[0].ids[2])


def test_the_model_without_its_head(tmp_path: Path) -> None:
    model = build(0)
    model.git.save_pretrained(tmp_path)
    loaded = vlp.load(tmp_path)
    assert not loaded.model.objectives and not loaded.report.unexpected and not loaded.report.missing


def test_older_files(tmp_path: Path) -> None:
    """transformers 4 also stored counted positions; models of several frames an embedding of each."""
    build(0).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["git.embeddings.position_ids"] = torch.arange(16)[None]
    state["git.image_encoder.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    state["git.img_temporal_embedding.0"] = torch.zeros(1, 1, 32)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = vlp.load(tmp_path)
    assert len(loaded.report.ignored) == 3 and not loaded.report.unexpected


def test_captions(tmp_path: Path) -> None:
    """`caption` writes without a decoder, from the tokenizer beside the model."""
    model = build(0)
    model.save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[MASK]", *(f"w{n}" for n in range(WORDS - 5)), "[CLS]", "[SEP]"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    loaded = vlp.load(tmp_path, tokenizer=tmp_path)
    image = Image.new("RGB", (40, 50), (200, 30, 90))
    text = loaded.caption([image], max_length=8)
    assert len(text) == 1 and isinstance(text[0], str)
    pixels = loaded._pixels([image]).pixels
    normal = (pixels.float() / 255 - loaded.model.vision.mean) / loaded.model.vision.std
    wanted = model.generate(pixel_values=normal, max_length=8, do_sample=False)
    assert text[0] == loaded.tokenizer.decode(wanted[0].tolist())
