"""The caption of the nearest training image, a floor for captioning: what copying reaches.

Near are images of like pixels, or of like embeddings by a checkpoint that one names.
Shapes: n images, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from downstream.metrics.retrieval import topk_chunked
from downstream.task import EvalSample, evaluating, gather, groups, make_batch, my_share, read_samples
from objectives.base import Embed
from vlp.checkpoint.load import load
from vlp.data.batch import Example
from vlp.data.loader import DataConfig
from vlp.data.reader import Reader
from vlp.data.transforms import EvalTransform
from vlp.run import Parts, RunConfig

Describe = Callable[[Sequence[EvalSample]], Tensor]
"""Samples -> unit-norm vectors of their first images [n, F], float32."""
SIDE = 16
BATCH = 64


@dataclass(frozen=True)
class TrainImages:
    """Images whose captions may be copied."""

    reader: Reader
    data: DataConfig
    captions: Mapping[int, str]
    """By the number of a sample in the reader, the first caption of its image; one sample an image."""

    def some(self, number: int) -> TrainImages:
        """Return at most ``number`` images, evenly spaced."""
        every = list(self.captions.items())
        step = max(1.0, len(every) / number) if number else 1.0
        kept = dict(every[int(i * step)] for i in range(min(number, len(every))))
        return TrainImages(self.reader, self.data, kept)


def by_pixels(data: DataConfig) -> Describe:
    """Compare images as 16 x 16 thumbnails, mean and contrast apart."""
    resize = EvalTransform(data.transform.model_copy(update={"image_size": SIDE}))

    def describe(samples: Sequence[EvalSample]) -> Tensor:
        pixels = torch.stack([resize(one.sample.images[0]) for one in samples]).float().flatten(1)
        return F.normalize(pixels - pixels.mean(1, keepdim=True), dim=1)

    return describe


def by_embedding(source: str, data: DataConfig, device: torch.device) -> Describe:
    """Compare images by a checkpoint's contrastive embeddings; ``source`` is as for vlp.load.

    Raises:
        ValueError: it cannot be loaded, or has no such embeddings.
    """
    loaded = load(source, device=device)
    if loaded.model.space() is None:
        raise ValueError(f"task.neighbours_by {source}: has no contrastive embeddings (objective itc); name another")
    run = RunConfig(model=loaded.model.config, objectives=dict(loaded.config.objectives), data=data)
    parts = Parts(run, loaded.model, loaded.tokenizer, None)

    def describe(samples: Sequence[EvalSample]) -> Tensor:
        examples = [Example(one.sample.key, one.sample.images[:1], "", image_id=n) for n, one in enumerate(samples)]
        with evaluating(loaded.model):
            return loaded.model.run([Embed("image")], make_batch(parts, examples))[Embed("image")].float()

    return describe


def nearest_captions(
    describe: Describe, train: TrainImages, reader: Reader, data: DataConfig, indices: Sequence[int]
) -> dict[str, str]:
    """Return the caption of the nearest training image for each image; all ranks share the work.

    Args:
        describe: what makes images near.
        train: whose captions are copied.
        reader: has the images.
        data: how they are read.
        indices: one sample of each image; those that cannot be read are left out.
    """
    known = list(train.captions)
    keys = _vectors(describe, _pictures(train.reader, train.data, known[my_share(len(known))]))
    queries = _vectors(describe, _pictures(reader, data, list(indices)[my_share(len(indices))]))
    if not keys or not queries:
        return {}
    one, other = (torch.stack([vector for _, vector in pairs]) for pairs in (queries, keys))
    found = topk_chunked(one, other, 1)[1][:, 0].tolist()
    captions = [train.captions[sample.index] for sample, _ in keys]
    return {sample.image: captions[n] for (sample, _), n in zip(queries, found, strict=True)}


def _pictures(reader: Reader, data: DataConfig, indices: Sequence[int]) -> Iterator[EvalSample]:
    """Samples with a picture; of features alone nothing is known here."""
    samples = read_samples(reader, data, {}, texts=False, indices=indices)
    return (one for one in samples if one.sample.images)


def _vectors(describe: Describe, samples: Iterator[EvalSample]) -> list[tuple[_Place, Tensor]]:
    """Every rank's vectors, on the CPU."""
    own: list[tuple[_Place, Tensor]] = []
    for group in groups(samples, BATCH):
        places = [_Place(one.index, one.image) for one in group]
        own += zip(places, describe(group).cpu(), strict=True)
    return gather(own)


@dataclass(frozen=True)
class _Place:
    index: int
    image: str
