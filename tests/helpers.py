"""Tiny models and batches for tests; everything is a pure function of sample positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from encoders import GridConfig, PatchConfig, TextConfig
from encoders.types import Batch, Images, Texts
from objectives import AnswerConfig, ItcConfig, ItmConfig, LmConfig, MlmConfig, ObjectiveConfig, SigmoidConfig
from objectives.base import Draw
from vlp.decoder import DecoderConfig
from vlp.fusion import FusionConfig, NoFusionConfig
from vlp.fusion.dual import DualStreamConfig
from vlp.fusion.single import SingleStreamConfig
from vlp.model import EmbedConfig, Model, ModelConfig, build_model

SIZES = {"width": 32, "layers": 2, "heads": 4}
VOCABULARY, LENGTH, PIXELS = 50, 8, 16
CLS, SEP, MASK, FIRST_WORD = 1, 2, 3, 5
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "itc": ItcConfig(),
    "sigmoid": SigmoidConfig(),
    "itm": ItmConfig(),
    "mlm": MlmConfig(),
    "lm": LmConfig(),
    "answer": AnswerConfig(answers=("yes", "no", "maybe")),
}


def tiny_model(
    fusion: FusionConfig | str = "dual_stream",
    objectives: Iterable[str] | Mapping[str, ObjectiveConfig] = ("itc", "itm", "mlm"),
    *,
    dropout: float = 0.0,
    seed: int = 0,
    vision: PatchConfig | GridConfig | None = None,
) -> Model:
    """A model of two small blocks a part; ``fusion`` may be none, single_stream, dual_stream, co or a config.

    It has a decoder exactly if an objective is called lm.
    """
    if not isinstance(objectives, Mapping):
        objectives = {name: OBJECTIVES[name] for name in objectives}
    sizes: dict[str, Any] = {**SIZES, "dropout": dropout}
    if isinstance(fusion, str):
        fusion = {
            "none": NoFusionConfig(),
            "single_stream": SingleStreamConfig(**sizes),
            "dual_stream": DualStreamConfig(**sizes),
            "co": DualStreamConfig(**sizes, attention="co"),
        }[fusion]
    config = ModelConfig(
        vision=vision
        or PatchConfig(
            model="vit_tiny_patch16_224", pretrained=False, image_size=PIXELS, patch_size=4, width=32, depth=2, heads=4
        ),
        text=TextConfig(**sizes, vocabulary_size=VOCABULARY, max_length=LENGTH),
        fusion=fusion,
        decoder=DecoderConfig(**sizes) if "lm" in objectives else None,
        embed=EmbedConfig(width=16),
    )
    return build_model(config, objectives, seed=seed)


def tiny_batch(
    n: int,
    views: Sequence[str] = ("clean", "masked", "causal"),
    *,
    first: int = 0,
    ids: Sequence[int] | None = None,
    seen: int = 0,
    counts: tuple[tuple[int, int], ...] | None = None,
) -> Batch:
    """Samples ``first`` to ``first + n``: a sample's pixels, words and labels depend on its position alone.

    Args:
        n: pairs.
        views: of the text; "clean" is always made.
        first: position of the first sample.
        ids: image and caption ids, where some shall be equal; the positions by default.
        seen: samples before this step.
        counts: (images, texts) of every rank.
    """
    draws = [Draw(0).sample("tiny", position) for position in range(first, first + n)]
    pixels = torch.stack([torch.from_numpy(d.integers(0, 256, (3, PIXELS, PIXELS), dtype="uint8")) for d in draws])
    clean, keep, chosen = (torch.zeros(n, LENGTH, dtype=kind) for kind in (torch.long, torch.bool, torch.bool))
    for row, draw in enumerate(draws):
        length = int(draw.integers(4, LENGTH + 1))
        words = torch.from_numpy(draw.integers(FIRST_WORD, VOCABULARY, length - 2))
        clean[row, :length] = torch.tensor([CLS, *words.tolist(), SEP])
        keep[row, :length] = True
        chosen[row, 1 : 1 + int(draw.integers(1, length - 1))] = True
    following = torch.full_like(clean, -100)
    following[:, :-1] = clean[:, 1:].where(keep[:, 1:], -100)
    texts = {
        "clean": Texts(clean, keep),
        "masked": Texts(clean.masked_fill(chosen, MASK), keep, labels=clean.where(chosen, -100)),
        "causal": Texts(clean, keep, attention="causal", labels=following),
    }
    marks = torch.tensor(range(first, first + n) if ids is None else ids)
    return Batch(
        images={"clean": Images(pixels)},
        texts={view: texts[view] for view in ("clean", *views)},
        image_id=marks,
        caption_id=marks,
        position=torch.arange(first, first + n),
        seen=seen,
        counts=counts,
    )


def split_batch(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """Cut a batch of pairs (one text an image) into consecutive ones of these sizes."""
    found, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        texts = {
            view: replace(t, ids=t.ids[rows], keep=t.keep[rows], labels=None if t.labels is None else t.labels[rows])
            for view, t in batch.texts.items()
        }
        images = {view: Images(i.pixels[rows]) for view, i in batch.images.items()}
        assert batch.image_id is not None and batch.caption_id is not None and batch.position is not None
        found.append(
            replace(
                batch,
                images=images,
                texts=texts,
                image_id=batch.image_id[rows],
                caption_id=batch.caption_id[rows],
                position=batch.position[rows],
            )
        )
        start += size
    return found


def exact_losses() -> AbstractContextManager:
    """Leave float64 logits as they are: losses are else computed in float32, which hides differences below 1e-7."""
    return mock.patch.object(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else x.to(torch.float32))
