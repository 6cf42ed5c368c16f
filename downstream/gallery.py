"""All images and texts of a data set, and the model run over them: embeds once each, pairs in blocks of images.

All ranks share the work. Memory grows with a rank's share of the gallery's embeddings (N x E) and with one batch or
block.
Shapes: N images, S texts, E embedding, P pairs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from downstream.seeing import Seeing, seeing
from downstream.task import evaluating, gather, gather_bad, image_key, read_samples
from encoders.types import Batch, Images, Regions, Texts
from objectives.base import Embed, Fuse, Rows, ViewText
from objectives.collectives import gather_no_grad, rank, world_size
from objectives.itm import Itm
from objectives.rank import Rank
from vlp.data.asking import prefixed
from vlp.data.batch import pad_texts
from vlp.data.group import without_images
from vlp.data.loader import DataConfig, leave_signals
from vlp.data.order import rank_slice
from vlp.data.reader import BadSample, Reader, decode_sample
from vlp.data.regions import RegionArrays
from vlp.data.tokenizer import Tokenizer
from vlp.data.transforms import EvalTransform, pad_images
from vlp.model import Model, ModelConfig

Picture: TypeAlias = Tensor | RegionArrays
"""An image's pixels, or what a detector saw of it."""
Matcher: TypeAlias = Itm | Rank
"""A head that scores fused pairs."""

FEW = 64
"""Images of a worker below which starting it takes longer than it saves."""

_PAIRS = Fuse(rows="pairs")


@dataclass(frozen=True)
class Pixels(Dataset[Any]):
    """Images of a reader as the encoder takes them; picklable, for loader workers."""

    reader: Reader
    rows: npt.NDArray[np.int64]
    """Where the reader has each image."""
    data: DataConfig
    transform: EvalTransform
    see: Seeing | None = None
    """How a detector's regions are read in place of images."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Picture | BadSample:
        """Return uint8 [3, H, W] of the encoder's size, or regions; an unusable image comes back as its error."""
        try:
            raw = self.reader[int(self.rows[index])]
            if self.see is not None:
                known = decode_sample(without_images(raw), text=self.data.text, need_image=False, need_text=False)
                return self.see(known)[0]
            sample = decode_sample(raw, image=self.data.image, text=self.data.text, need_text=False)
        except BadSample as error:
            return error
        return self.transform(sample.images[0])


@dataclass(frozen=True)
class Gallery:
    """What is searched, in both directions."""

    pixels: Dataset[Any]
    """Item n -> uint8 [3, H, W] of image n, or its regions, or a BadSample."""
    ids: Sequence[npt.NDArray[np.int64]]
    """Token ids of each text, special ones included."""
    image_of_text: Tensor
    """[S] int64, on the CPU."""
    image_keys: Sequence[str]
    """Name of each image: its field image_id, its path, or the sample's key."""
    captions: Sequence[str]
    """Each text in words."""
    pad: int = 0
    """Id at padding."""
    max_length: int | None = None
    """Most positions that the text encoder has."""
    workers: int = 0
    """Processes that decode images; 0 = this one."""
    see: Seeing | None = None
    """How a detector's regions are read in place of images."""

    def shown(self, model: Model, pictures: Sequence[Picture]) -> Images | Regions:
        """Lay images side by side: of one size, of their own aspect ratios (ViLT), or a detector's regions."""
        regions = [one for one in pictures if isinstance(one, RegionArrays)]
        if self.see is not None:
            return self.see.laid(regions)
        return pad_images([p for p in pictures if isinstance(p, Tensor)], getattr(model.vision, "patch_side", 1))

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.image_keys)

    @property
    def num_texts(self) -> int:
        """S."""
        return len(self.ids)

    def texts(self, index: Sequence[int]) -> Texts:
        """Return these texts, padded to the longest of them."""
        return pad_texts([ViewText(self.ids[i]) for i in index], "full", self.pad, self.max_length)

    def images(self, blocks: Sequence[Sequence[int]]) -> Iterator[list[Picture | BadSample]]:
        """Yield the pixels of each block of images."""
        enough = len(blocks) > self.workers and sum(map(len, blocks)) >= FEW * self.workers
        yield from DataLoader(
            self.pixels,
            batch_sampler=blocks,  # type: ignore[arg-type]
            num_workers=self.workers if enough else 0,
            collate_fn=list,
            worker_init_fn=leave_signals,
            generator=torch.Generator(),  # torch would draw from the global one, which a training run may be using
        )

    def without(self, images: Collection[int]) -> Gallery:
        """Return the gallery without these images and their texts."""
        kept = [n for n in range(self.num_images) if n not in images]
        number = torch.full((self.num_images,), -1)
        number[kept] = torch.arange(len(kept))
        fewer = self.some_texts(self.texts_of(kept))
        return replace(
            fewer,
            pixels=Subset(self.pixels, kept),
            image_of_text=number[fewer.image_of_text],
            image_keys=[self.image_keys[n] for n in kept],
        )

    def some_texts(self, index: Sequence[int]) -> Gallery:
        """Return the gallery with all images and only these texts."""
        return replace(
            self,
            ids=[self.ids[s] for s in index],
            image_of_text=self.image_of_text[list(index)],
            captions=[self.captions[s] for s in index],
        )

    def texts_of(self, images: Collection[int]) -> list[int]:
        """Return the texts of these images."""
        wanted = set(images)
        return [s for s, n in enumerate(self.image_of_text.tolist()) if n in wanted]


def open_gallery(
    reader: Reader, data: DataConfig, tokenizer: Tokenizer, model: ModelConfig, bad: dict[str, str], texts: bool = True
) -> Gallery:
    """Make the gallery of all images and all texts; samples of the same image become one image with several texts.

    Images are decoded when they are embedded.

    Args:
        reader: the data.
        data: names the members or columns, and says how images are resized.
        tokenizer: text to ids.
        model: whose images they are to be: of its size, or a detector's regions.
        bad: key -> reason of samples that cannot be used, filled on all ranks.
        texts: a sample without text is bad.

    Raises:
        ValueError: ``data.boxes`` is set: what a caption names is of its own image, and here each meets all others.
    """
    if data.boxes is not None:
        raise ValueError(
            f"data.boxes {data.boxes!r}: a gallery compares every text with every image, and the boxes that a text "
            "names are its own image's; compare whole images with --data.boxes none"
        )
    own: dict[str, str] = {}
    found = []
    for one in read_samples(reader, data, own, images=False, texts=texts, indices=_own(len(reader))):
        found.append((one.image, image_key(one.sample, data), one.index, one.sample.texts))
    bad |= gather_bad(own)
    number: dict[str, int] = {}
    keys: list[str] = []
    rows: list[int] = []
    captions: list[str] = []
    image_of_text: list[int] = []
    for image, key, row, given in gather(found):
        if image not in number:
            number[image] = len(keys)
            keys.append(key)
            rows.append(row)
        captions += given
        image_of_text += [number[image]] * len(given)
    see = seeing(model, data)
    side = {"image_size": model.vision.image_size} if see is None else {}  # which nobody asks of regions
    transform = EvalTransform(data.transform.model_copy(update=side))
    return Gallery(
        Pixels(reader, np.array(rows, dtype=np.int64), data, transform, see),
        [one.ids for one in prefixed(tokenizer, captions, data.prefix, data.max_length)],
        torch.tensor(image_of_text, dtype=torch.int64),
        keys,
        captions,
        tokenizer.vocabulary.pad,
        data.max_length,
        data.workers,
        see,
    )


def embed_images(model: Model, gallery: Gallery, batch: int) -> Iterator[tuple[list[int], Tensor, dict[int, str]]]:
    """Embed this rank's images, batch by batch.

    Yields:
        The images [n] of the batch that can be used, their unit-norm vectors [n, E] (float32, on the model's device),
        and image -> reason of the others.
    """
    own = _own(gallery.num_images)
    blocks = [own[first : first + batch] for first in range(0, len(own), batch)]
    for block, found in zip(blocks, gallery.images(blocks), strict=True):
        bad = {n: one.reason for n, one in zip(block, found, strict=True) if isinstance(one, BadSample)}
        good = [one for one in found if not isinstance(one, BadSample)]
        vectors = torch.zeros(0, model.config.embed.width, device=model.device)
        if good:
            vectors = _embed(model, Embed("image"), Batch(images={"clean": gallery.shown(model, good)}))
        yield [n for n in block if n not in bad], vectors, bad


def unreadable(gallery: Gallery, batch: int) -> dict[int, str]:
    """Return the images that cannot be used, with the reason, of all ranks; for models that embed none."""
    own = _own(gallery.num_images)
    blocks = [own[first : first + batch] for first in range(0, len(own), batch)]
    bad = {
        number: one.reason
        for block, found in zip(blocks, gallery.images(blocks), strict=True)
        for number, one in zip(block, found, strict=True)
        if isinstance(one, BadSample)
    }
    return dict(gather(list(bad.items())))


def embed_texts(model: Model, gallery: Gallery, batch: int) -> Tensor:
    """Embed this rank's texts -> [n, E] unit-norm, float32; texts of like length go together, to pad little."""
    own = _own(gallery.num_texts)
    order = sorted(own, key=lambda s: len(gallery.ids[s]))
    vectors = torch.zeros(len(own), model.config.embed.width, device=model.device)
    for first in range(0, len(own), batch):
        part = order[first : first + batch]
        rows = torch.tensor(part, device=model.device) - own.start
        vectors[rows] = _embed(model, Embed("text"), Batch(texts={"clean": gallery.texts(part)}))
    return vectors


def _embed(model: Model, name: Embed, batch: Batch) -> Tensor:
    with evaluating(model):
        return model.run([name], batch.to(model.device))[name].float()


def embed_shares(
    model: Model, gallery: Gallery, batch: int
) -> tuple[tuple[Tensor, tuple[int, ...]], tuple[Tensor, tuple[int, ...]], dict[int, str]]:
    """Embed everything once, each rank its own part.

    Returns:
        This rank's images [n, E] and texts [s, E], unit-norm float32 on the model's device, each with the sizes of all
        ranks' parts; and image -> reason of those of any rank that cannot be used, whose vectors are zero.
    """
    own = _own(gallery.num_images)
    images = torch.zeros(len(own), model.config.embed.width, device=model.device)
    bad: dict[int, str] = {}
    for block, vectors, broken in embed_images(model, gallery, batch):
        images[torch.tensor(block, dtype=torch.int64, device=model.device) - own.start] = vectors
        bad |= broken
    texts = embed_texts(model, gallery, batch)
    sizes = _shares(gallery.num_images), _shares(gallery.num_texts)
    return (images, sizes[0]), (texts, sizes[1]), dict(gather(list(bad.items())))


def _own(count: int) -> range:
    """This rank's part of ``count`` things."""
    return rank_slice(0, count, rank(), world_size())


def _shares(count: int) -> tuple[int, ...]:
    return tuple(len(rank_slice(0, count, each, world_size())) for each in range(world_size()))


def match_pairs(
    model: Model, gallery: Gallery, pairs: Tensor, head: Matcher, limit: int = 512, most_images: int = 64
) -> Tensor:
    """Match pairs of image and text, each once, over all ranks.

    The pairs come sorted by image. A block of images is encoded once, its keys and values are projected once, and its
    texts are encoded once; then all is forgotten, so that memory does not grow with the gallery. (An image in more than
    `limit` pairs makes several blocks.) Encoding an image a second time costs little beside its fusion rows.

    Args:
        model: with a fusion.
        gallery: what the pairs are of.
        pairs: [P] int64, ``image * S + text``, ascending, none twice; on the CPU.
        head: gives the matching logit.
        limit: most pairs of one block.
        most_images: most images of one block.

    Returns:
        Matching logits [P], float32, on the CPU.
    """
    counts = (pairs // gallery.num_texts).unique_consecutive(return_counts=True)[1]
    blocks = list(image_blocks(counts.tolist(), limit, most_images))
    shares = [[blocks[i] for i in rank_slice(0, len(blocks), each, world_size())] for each in range(world_size())]
    own = [_block_rows(pairs[block], gallery.num_texts) for block in shares[rank()]]
    scores = [torch.zeros(0, device=model.device)]
    for (_, texts, rows), pixels in zip(own, gallery.images([images for images, _, _ in own]), strict=True):
        if broken := [one for one in pixels if isinstance(one, BadSample)]:
            raise broken[0]  # it could be read before
        shown = gallery.shown(model, [one for one in pixels if not isinstance(one, BadSample)])
        batch = Batch({"clean": shown}, {"clean": gallery.texts(texts)}).to(model.device)
        moved = Rows(rows.image_index.to(model.device), rows.text_index.to(model.device))
        with evaluating(model):
            fused = model.run([_PAIRS], batch, rows={"pairs": moved})[_PAIRS]
            scores.append(head.score(fused.pooled).float())
    return gather_no_grad(torch.cat(scores), [sum(b.stop - b.start for b in share) for share in shares]).cpu()


def _block_rows(pairs: Tensor, num_texts: int) -> tuple[list[int], list[int], Rows]:
    """The images and texts of a block of pairs, and each pair by its place among them."""
    images, image_index = (pairs // num_texts).unique(return_inverse=True)
    texts, text_index = (pairs % num_texts).unique(return_inverse=True)
    return images.tolist(), texts.tolist(), Rows(image_index, text_index)


def image_blocks(counts: Sequence[int], limit: int, images: int) -> Iterator[slice]:
    """Cut rows that are grouped by image into blocks of whole images.

    Args:
        counts: rows of each image.
        limit: most rows of a block; an image with more is cut.
        images: most images of a block.
    """
    start = end = held = 0
    for count in counts:
        if held and (end - start + count > limit or held == images):
            yield slice(start, end)
            start, held = end, 0
        end, held = end + count, held + 1
        while end - start > limit:
            yield slice(start, start + limit)
            start += limit
    if end > start:
        yield slice(start, end)
