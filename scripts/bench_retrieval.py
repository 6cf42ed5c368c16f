"""Retrieval at the size of COCO's test images in two stages: memory, pairs, and time against matching all pairs.

    python scripts/bench_retrieval.py

5,000 images x 25,000 captions of random pixels and words; random weights, one vision block with 16 image tokens, two
text and two fusion layers, all of width 32; the 16 best of each query are matched. All pairs are matched on 200 images
x 1,000 captions by the same code; the ratio is that of one query's time there. Times are the process's own CPU seconds,
so that a busy machine does not matter. Fails above 2 GiB, or if more rows went through the fusion than there are
different pairs.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import numpy as np
import torch
from torch.utils.data import Dataset

from downstream.gallery import Gallery, match_pairs
from downstream.retrieval import RetrievalConfig, matching_head
from downstream.search import Found, merged_pairs
from encoders import PatchConfig, TextConfig
from objectives import ItcConfig, ItmConfig
from vlp.config import build
from vlp.fusion.dual import DualStreamConfig
from vlp.model import EmbedConfig, Model, ModelConfig, build_model

SIDE, PATCH, WIDTH, WORDS, LENGTH = 16, 4, 32, 1000, 12
MOST_MEMORY = 2 * 2**30


class RandomPixels(Dataset[torch.Tensor]):
    """Image n, drawn when it is asked for."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.number:
            raise IndexError(index)
        return torch.from_numpy(np.random.default_rng(index).integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8))


def make_gallery(images: int, texts: int) -> Gallery:
    """Random images, each with as many random captions of 5 to 12 ids as another."""
    draw = np.random.default_rng(0)
    owner = torch.arange(texts) * images // texts
    ids = [draw.integers(2, WORDS, int(draw.integers(5, LENGTH + 1))) for _ in range(texts)]
    keys = [str(n) for n in range(images)]
    return Gallery(RandomPixels(images), ids, owner, keys, [str(n) for n in range(texts)], 0, LENGTH)


def make_model() -> Model:
    """The toy model, with random weights."""
    sizes = {"width": WIDTH, "layers": 2, "heads": 4}
    vision = PatchConfig(
        model="vit_tiny_patch16_224",
        pretrained=False,
        image_size=SIDE,
        patch_size=PATCH,
        width=WIDTH,
        depth=1,
        heads=4,
        class_token=False,
    )
    config = ModelConfig(
        vision=vision,
        text=TextConfig(**sizes, vocabulary_size=WORDS, max_length=LENGTH),
        fusion=DualStreamConfig(**sizes),
        embed=EmbedConfig(width=WIDTH),
    )
    return build_model(config, {"itc": ItcConfig(), "itm": ItmConfig()}, seed=0).eval()


def two_stages(model: Model, gallery: Gallery, k: int) -> tuple[Found, float]:
    """Search in both directions; return what is found and the seconds it took."""
    task = build(RetrievalConfig, {"k": k})
    start = time.process_time()
    found = task.search(model, gallery, {})
    return found, time.process_time() - start


def all_pairs(model: Model, gallery: Gallery) -> float:
    """Match every pair; return the seconds it took."""
    head = matching_head(model)
    assert head is not None
    start = time.process_time()
    match_pairs(model, gallery, torch.arange(gallery.num_images * gallery.num_texts), head)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--texts", type=int, default=25000)
    parser.add_argument("--k", type=int, default=16)
    given = parser.parse_args()
    model = make_model()
    small, queries = make_gallery(200, 1000), 1200
    two_stages(model, small, given.k)  # warms up
    _, fast = two_stages(model, small, given.k)
    slow = all_pairs(model, small)
    print(f"200 images x 1,000 texts, a query: two stages {1e3 * fast / queries:.2f} ms, ", end="")
    print(f"all pairs {1e3 * slow / queries:.2f} ms, ratio {slow / fast:.1f}")

    gallery = make_gallery(given.images, given.texts)
    rows: list[int] = []
    model.fusion.register_forward_hook(lambda module, args, out: rows.append(len(out.pooled)))
    found, seconds = two_stages(model, gallery, given.k)
    pairs, queries = len(merged_pairs(gallery, found.i2t, found.t2i)), given.images + given.texts
    asked, every = queries * given.k, given.images * given.texts
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{given.images:,} images x {given.texts:,} texts: {seconds:.0f} s, {1e3 * seconds / queries:.2f} ms a query")
    print(f"pairs: {asked:,} candidates, {pairs:,} different ones, {sum(rows):,} matched, {every:,} in all")
    print(f"peak memory of the process: {peak / 2**20:,.0f} MiB")
    if sum(rows) != pairs:
        sys.exit("a pair was matched twice")
    if peak > MOST_MEMORY:
        sys.exit(f"more than {MOST_MEMORY / 2**30:.0f} GiB")


if __name__ == "__main__":
    main()
