"""What would be wrong without a word: looks that a format cannot say, how texts begin, pixels beyond the patches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from checkpoints import save
from helpers import SIZES, tiny_batch, tiny_model
from PIL import Image
from standins import GOLDENS
from test_export import own_clip
from test_hf_blip import BOS, SEP, WORDS
from test_hf_blip import config as blip_config
from test_hf_blip import pair as blip_pair
from test_hf_clip import text_config, vision_config
from two_towers import randomise

import vlp
from encoders.types import Batch, Images
from objectives.base import Draw, Embed, Encode
from vlp.checkpoint.export import convert
from vlp.checkpoint.inspect import inspect
from vlp.data.decode import rgb_tensor
from vlp.data.presets import albef_blip
from vlp.fusion.bridge import BridgeConfig
from vlp.generate import GenerationConfig, generate_text

HEADS = {"bert_config": {"num_attention_heads": 4}, "vit": {"num_heads": 4}}


def picture(height: int = 41, width: int = 70) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["Siglip", "CLIP"])
def test_pixels_beyond_the_last_whole_patch(kind: str, tmp_path: Path) -> None:
    """SigLIP's 384 pixels with patches of 14: the image is scaled to 384, of which 378 are seen."""
    activation = {"hidden_act": "gelu_pytorch_tanh" if kind == "Siglip" else "quick_gelu"}
    text = text_config(hidden_size=32, projection_size=32, **activation)
    towers = {"text_config": text, "vision_config": vision_config(image_size=19, **activation)}
    settings = getattr(transformers, f"{kind}Config")(**towers)
    theirs = randomise(getattr(transformers, f"{kind}Model")(settings), 0)
    theirs.save_pretrained(tmp_path)
    loaded = vlp.load(tmp_path)
    assert loaded.model.config.vision.image_size == 19 and loaded.model.vision.grid == (2, 2)
    pixels = torch.randn(2, 3, 19, 19, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs.vision_model(pixel_values=pixels)
        found = loaded.model.run([Encode("image"), Embed("image")], Batch({"clean": Images(pixels)}, {}))
    torch.testing.assert_close(found[Encode("image")].pooled, wanted.pooler_output, rtol=1e-4, atol=1e-5)


def test_written_texts_begin_as_the_config_says(tmp_path: Path) -> None:
    """bos_token_id of config.json, whatever the tokenizer calls its own; and so after `vlp convert`."""
    settings = blip_config(0)
    theirs, _ = blip_pair(transformers.BlipForConditionalGeneration, settings, tmp_path / "in", 0)
    names = (f"w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(WORDS - 5))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *names]
    (tmp_path / "in" / "vocab.txt").write_text("\n".join(words))
    loaded = vlp.load(tmp_path / "in")
    assert (loaded.tokenizer.vocabulary.bos, loaded.tokenizer.vocabulary.sep) == (BOS, SEP)
    pixels = albef_blip(settings.vision_config.image_size).pixels(rgb_tensor(picture()))[None]
    memory = loaded.model.run([Encode("image")], Batch({"clean": Images(pixels)}, {}))[Encode("image")]
    ids, _ = generate_text(loaded.model, memory, loaded.tokenizer.vocabulary, GenerationConfig(max_length=12))
    wanted = theirs.generate(pixels, max_length=12, do_sample=False, num_beams=1)[0].tolist()
    assert ids[0] == wanted[: len(ids[0])] and ids[0][0] == BOS
    assert loaded.caption([picture()], max_length=12) == [loaded.tokenizer.decode(wanted)]
    convert(loaded, tmp_path / "own", "vlp")
    assert vlp.load(tmp_path / "own").caption([picture()], max_length=12) == loaded.caption([picture()], max_length=12)


def test_albef_keeps_mean_std_and_look(tmp_path: Path) -> None:
    settings = {
        "model": {"vision": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}},
        "data": {"transform": {"interpolation": "bilinear"}, "tokenizer": {"clean": "none"}},
    }
    loaded = vlp.load(GOLDENS / "albef_retrieval" / "model.pth", config=HEADS, settings=settings)
    left = convert(loaded, tmp_path / "out", "albef")
    assert left == ("data.tokenizer.clean none (it cleans texts in its own way)",)
    again = vlp.load(tmp_path / "out" / "model.pth")
    assert again.model.config.vision.mean == (0.1, 0.2, 0.3) and again.model.config.vision.std == (0.4, 0.5, 0.6)
    assert torch.equal(again.embed_images([picture()]), loaded.embed_images([picture()]))


@pytest.mark.parametrize("crop", ["round", "floor"])
def test_open_clip_cuts_as_we_do_or_it_is_said(crop: str, tmp_path: Path) -> None:
    """On an image whose middle lies between two pixels."""
    save(tmp_path / "in", own_clip(causal=True))
    look = {"resize": "shortest", "crop": crop, "resampler": "pillow"}
    loaded = vlp.load(tmp_path / "in", settings={"data": {"transform": look}})
    left = convert(loaded, tmp_path / "out", "open_clip")
    assert left == (() if crop == "round" else ("data.transform.crop floor (it has round)",))
    settings = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert settings["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "."
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    image = picture(32, 55)
    with torch.no_grad():
        found = model.eval().encode_image(preprocess(image)[None], normalize=True)
    same = torch.allclose(found, loaded.embed_images([image]), rtol=1e-4, atol=1e-5)
    assert same == (crop == "round")


def test_a_look_that_transformers_cannot_have_is_said(tmp_path: Path) -> None:
    save(tmp_path / "in", own_clip(causal=True))
    loaded = vlp.load(tmp_path / "in", settings={"data": {"transform": {"resize": "longest", "resampler": "pillow"}}})
    left = convert(loaded, tmp_path / "out", "hf")
    assert "data.transform.resize longest (it has squash)" in left


def test_reranking_scores_as_the_repositories_do() -> None:
    """The second logit of the matching head alone, which orders pairs otherwise than the log odds."""
    for name, config in (
        ("albef_retrieval", HEADS),
        ("albef_pretrain", HEADS),
        ("blip_itm", {}),
        ("hf_blip_itm", None),
    ):
        source = GOLDENS / name if name.startswith("hf") else GOLDENS / name / "model.pth"
        assert inspect(source, config).config.objectives["itm"].score == "logit", name
    loaded = vlp.load(GOLDENS / "albef_retrieval" / "model.pth", config=HEADS)
    head = loaded.model.objectives["itm"]
    pooled = torch.randn(9, head.head.in_features, generator=torch.Generator().manual_seed(0))
    logits = head.head(pooled)
    assert torch.equal(head.score(pooled), logits[:, 1])
    torch.testing.assert_close(head.log_odds(pooled), logits[:, 1] - logits[:, 0])
    odds = vlp.load(
        GOLDENS / "albef_retrieval" / "model.pth", config=HEADS, settings={"objectives": {"itm": {"score": "log_odds"}}}
    )
    torch.testing.assert_close(odds.model.objectives["itm"].score(pooled), head.log_odds(pooled))
    assert head.score(pooled).argsort().tolist() != head.log_odds(pooled).argsort().tolist()


def test_the_probability_of_a_match_does_not_depend_on_the_score(tmp_path: Path) -> None:
    save(tmp_path / "one", tiny_model("dual_stream", ["itc", "itm"]))
    first, second = (
        vlp.load(tmp_path / "one", settings={"objectives": {"itm": {"score": score}}})
        for score in ("logit", "log_odds")
    )
    assert torch.equal(first.match([picture()], ["a red car"]), second.match([picture()], ["a red car"]))


# Messages.


@pytest.mark.parametrize("text", ["", "{}", "[1]", "{", '{"model": {"type": "WordPiece"}}', '{"model": {"vocab": 3}}'])
def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, text: str) -> None:
    shutil.copytree(GOLDENS / "hf_clip", tmp_path / "clip")
    (tmp_path / "clip" / "tokenizer.json").write_text(text)
    loaded = vlp.load(tmp_path / "clip")
    with pytest.raises(ValueError, match="tokenizer") as error:
        loaded.embed_texts(["a cat"])
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_is_not_there_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def nowhere(*given: Any) -> None:
        asked.append(given)
        raise ValueError("the hub cannot be reached")

    loaded = vlp.load(GOLDENS / "albef_retrieval" / "model.pth", config=HEADS)
    monkeypatch.setattr("vlp.loaded.build_tokenizer", nowhere)
    for _ in range(3):
        with pytest.raises(
            ValueError, match=r"the hub cannot be reached; or give vlp.load\(\.\.\., tokenizer=FOLDER\)"
        ):
            loaded.embed_texts(["a cat"])
    assert len(asked) == 1
    assert inspect(GOLDENS / "albef_retrieval" / "model.pth").words.startswith("bert-base-uncased, which is read when")


def test_a_tokenizer_of_more_words_than_the_model_is_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "hf_clip", tmp_path / "clip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{n}" for n in range(300))]
    (tmp_path / "clip" / "vocab.txt").write_text("\n".join(words))
    loaded = vlp.load(tmp_path / "clip")
    rows = loaded.model.text.word_embedding.shape[0]
    with pytest.raises(ValueError, match=rf"the tokenizer has 305 words and the model {rows}; give vlp.load"):
        loaded.embed_texts(["word7"])


def test_a_checkpoint_without_a_tokenizer_says_so() -> None:
    with pytest.raises(ValueError, match=r"comes without a tokenizer; give vlp\.load"):
        vlp.load(GOLDENS / "hf_clip").embed_texts(["a cat"])
    found = inspect(Path(__file__).parent / "format_1")
    assert {"embed_texts", "match"} <= set(found.abilities) and found.words == "beside the weights"


def test_a_captioner_that_is_asked_says_what_it_can_do() -> None:
    loaded = vlp.load(GOLDENS / "blip_decoder" / "model.pth")
    with pytest.raises(
        ValueError, match=r"cannot answer questions; train one with .* objective answer, or use caption$"
    ):
        loaded.answer([picture()], ["what is it?"])


@pytest.mark.parametrize("junk", [b"exported by hand", b"", b"\x89PNG\r\n\x1a\n" + bytes(64)])
def test_junk_is_called_so(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "junk.pth").write_bytes(junk)
    with pytest.raises(ValueError, match=r"(no file of weights|damaged).*\); nothing of it was executed"):
        vlp.load(tmp_path / "junk.pth")


def test_a_bridge_that_is_longer_than_its_towers_has_a_remedy() -> None:
    model = tiny_model(BridgeConfig(**{**SIZES, "layers": 3}), ["itm"])
    with pytest.raises(
        ValueError, match=r"tower has 2; lower model.fusion.layers, or give model.(vision|text) as many"
    ):
        model.losses(tiny_batch(4), Draw(0))
