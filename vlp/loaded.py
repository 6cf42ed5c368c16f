"""A loaded model and what it can do: embed, match, answer, caption, classify.

Shapes: n images, texts or pairs, E embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from encoders.types import Batch, Images, Texts, Tokens
from objectives.answer import Answer
from objectives.base import Embed, Encode, Fuse, Pass
from objectives.itm import Itm
from objectives.lm import Lm
from objectives.rank import Rank
from vlp.config import build
from vlp.data.asking import DESCRIBE, prefixed
from vlp.data.batch import pad_texts
from vlp.data.decode import AnyImage, read_image
from vlp.data.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from vlp.data.transforms import EvalTransform, pad_images
from vlp.generate import GenerationConfig, generate_text, room_of, trim
from vlp.generate_masked import generate_masked, masked_writer
from vlp.model import Model
from vlp.passes import memory_of
from vlp.rank import answer_texts, rank_answers

if TYPE_CHECKING:
    from vlp.checkpoint.load import LoadedConfig
    from vlp.checkpoint.native import LoadReport


@dataclass(frozen=True)
class LazyTokenizer:
    """A foreign checkpoint's tokenizer, read when text is first needed: its weights alone may be all one has."""

    config: TokenizerConfig
    """The family's published tokenizer."""
    folder: Path | None = None
    """The checkpoint's own folder, where it holds tokenizer files."""

    @property
    def found(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ValueError: there is none; it is looked for once, as a hub that cannot be reached takes most of a minute.
        """
        if isinstance(self._looked_for, ValueError):
            raise ValueError(str(self._looked_for)) from self._looked_for
        return self._looked_for

    @cached_property
    def _looked_for(self) -> Tokenizer | ValueError:
        if self.folder is None and self.config.source == "train":
            hint = "give vlp.load(..., tokenizer=FOLDER) or --tokenizer FOLDER"
            return ValueError(f"this checkpoint comes without a tokenizer; {hint}")
        try:
            # What the family does to a text (cleaning, full length, added tokens) holds for its own files too.
            here = {} if self.folder is None else {"source": str(self.folder)}
            return build_tokenizer(self.config.model_copy(update=here), ())
        except ValueError as error:
            return ValueError(f"{error}; or give vlp.load(..., tokenizer=FOLDER) or --tokenizer FOLDER")


@dataclass(frozen=True)
class Loaded:
    """A model ready for use. Tensors that its methods return are float32 on the CPU.

    Every method raises ValueError, in one line, for an image that cannot be read, for nothing to choose from (no names,
    no answers) and for what the model was not trained to do. No images, texts or pairs give an empty result. Texts are
    cut at ``config.data.max_length`` tokens.
    """

    model: Model
    """In evaluation mode."""
    words: Tokenizer | LazyTokenizer
    """The tokenizer, or where it is to be found."""
    config: LoadedConfig
    """The stored config of model, objectives and data."""
    report: LoadReport
    """What became of the stored weights."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back.

        Raises:
            ValueError: a foreign checkpoint's tokenizer is neither beside it nor on the hub (or its cache), or is not
                that of this model.
        """
        if not isinstance(self.words, LazyTokenizer):
            return self.words
        size, rows = self.words.found.vocabulary.size, self.model.text.word_embedding.shape[0]
        if size > rows:
            raise ValueError(
                f"the tokenizer has {size} words and the model {rows}; give vlp.load(..., tokenizer=FOLDER) the one "
                "that it was trained with"
            )
        return self.words.found

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def embed_images(self, images: Sequence[AnyImage], *, batch_size: int = 32) -> Tensor:
        """Images -> unit-norm vectors [n, E] of the common space."""
        return self._embed(Embed("image"), ((part, None) for part in _parts(images, "images", batch_size)))

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
        """Texts -> unit-norm vectors [n, E] of the common space."""
        return self._embed(Embed("text"), ((None, part) for part in _parts(texts, "texts", batch_size)))

    def match(self, images: Sequence[AnyImage], texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
        """Pairs of an image and a text -> probability [n] that they belong together, by the fused model.

        A model that was finetuned to rank (objective rank) gives the sigmoid of its score, which orders pairs alone.
        """
        self._need_fusion("match")
        heads = [one for kind in (Itm, Rank) for one in self.model.objectives.values() if isinstance(one, kind)]
        if not heads:
            raise ValueError(f"this checkpoint has no matching head ({self._objectives}); pretrain with objective itm")
        head = heads[0]
        found = []
        for part in _pairs(images, texts, "texts", batch_size):
            with torch.inference_mode():
                pooled = self._run([Fuse()], *part)[Fuse()].pooled
                odds = head.log_odds(pooled) if isinstance(head, Itm) else head.score(pooled)
                found.append(odds.float().sigmoid())
        return _stack(found, 0)

    def answer(
        self,
        images: Sequence[AnyImage],
        questions: Sequence[str],
        answers: Sequence[str] | None = None,
        *,
        k: int = 128,
        batch_size: int = 32,
    ) -> list[str]:
        """Answer one question about each image: from the trained answer list, else written by the decoder.

        Args:
            images: one a question.
            questions: to answer.
            answers: for a decoder: choose among these, as ALBEF and BLIP do, instead of writing freely.
            k: of them, those whose first word is likeliest are scored as a whole.
            batch_size: questions run at a time.
        """
        self._need_fusion("answer questions")
        choose = next((one for one in self.model.objectives.values() if isinstance(one, Answer)), None)
        write = self._writer("fused")
        if choose is None and write is None:
            raise ValueError(
                f"this checkpoint cannot answer questions ({self._objectives}); finetune it on questions: "
                "objective answer, or objective lm with memory fused"
            )
        if answers is not None and write is None:
            raise ValueError(
                "answers are for a checkpoint that writes them; this one was trained to choose from its own"
            )
        given = None
        if answers is not None:
            length = self.config.data.max_length
            given = answer_texts(self.model, self.tokenizer, _words(answers, "answers"), length, objective=write)
        found: list[str] = []
        for part in _pairs(images, questions, "questions", batch_size):
            with torch.inference_mode():
                if choose is not None and answers is None:
                    pooled = self._run([Fuse()], *part)[Fuse()].pooled
                    found += [choose.config.answers[best] for best in choose.scores(pooled).argmax(1).tolist()]
                    continue
                assert write is not None
                memory = self._memory(*part)
                if answers is None or given is None:
                    found += self._write(write, memory, {})
                else:
                    best, _ = rank_answers(self.model, memory, given, min(k, len(answers)), objective=write)
                    found += [answers[number] for number in best[:, 0].tolist()]
        return found

    def caption(self, images: Sequence[AnyImage], *, batch_size: int = 32, **generation: Any) -> list[str]:
        """Write a caption of each image; ``generation`` are fields of `GenerationConfig` (``method="beam"``)."""
        write, by_masks = self._writer("image"), masked_writer(self.model) is not None
        asked = write is None and self.model.config.answers_instructions  # OFA
        write = self._writer("fused") if asked else write
        words = getattr(self.config, "task", {}).get("ask", DESCRIBE)  # of its finetuning, if there was one
        if write is None and not by_masks:
            raise ValueError(
                f"this checkpoint cannot write captions ({self._objectives}); train it with "
                "model.decoder.kind causal and objective lm, or with objective seq2seq_mlm"
            )
        found: list[str] = []
        for part in _parts(images, "images", batch_size):
            question = [words] * len(part) if asked else None
            with torch.inference_mode():
                if write is not None:
                    found += self._write(write, self._memory(part, question), generation)
                else:
                    found += self._write_by_masks(part, generation)
        return found

    def classify(
        self, images: Sequence[AnyImage], names: Sequence[str], template: str = "a photo of {}", *, batch_size: int = 32
    ) -> Tensor:
        """Images -> probabilities [n, C] of classes known by name only, by similarity of the embeddings.

        Args:
            images: to classify.
            names: of the classes, at least one.
            template: the text of a class, ``{}`` standing for its name; ``"{}"`` is the name alone.
            batch_size: images or texts run at a time.
        """
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no place for the class name; write {{}} where it belongs")
        classes = [template.replace("{}", name) for name in _words(names, "names")]
        image = self.embed_images(images, batch_size=batch_size)
        text = self.embed_texts(classes, batch_size=batch_size)
        space = self.model.space()
        assert space is not None
        scale = space.logit_scale.detach().float().cpu().exp()
        return (scale * image @ text.T).softmax(1)

    @property
    def _objectives(self) -> str:
        return f"its objectives are {', '.join(self.model.objectives) or 'none'}"

    def _need_fusion(self, what: str) -> None:
        if self.model.fusion is None:
            can = [one for one in ABILITIES if one in abilities(self.config)]
            train = "itm" if what == "match" else "answer"
            raise ValueError(
                f"this checkpoint has no fusion (model.fusion.kind none) and cannot {what}; train one with "
                f"model.fusion.kind dual_stream and objective {train}" + (f", or use {', '.join(can)}" if can else "")
            )

    def _writer(self, memory: str) -> str | None:
        """Name of the objective that writes from this memory."""
        writers = {name: one for name, one in self.model.objectives.items() if isinstance(one, Lm)}
        wanted = {memory, "beside"} if memory == "image" else {memory}
        return next((name for name, one in writers.items() if one.config.memory in wanted), None)

    def _memory(self, images: Sequence[AnyImage], questions: Sequence[str] | None) -> Tokens:
        """What a decoder reads: images, or images fused with questions."""
        if questions is None:
            return self._run([Encode("image")], images, None)[Encode("image")]
        assert self.model.decoder is not None
        return memory_of(self._run([Fuse()], images, questions)[Fuse()], self.model.decoder.config.memory)

    def _write(self, objective: str, memory: Tokens, settings: dict[str, Any]) -> list[str]:
        config = build(GenerationConfig)
        room = min(config.max_length, room_of(self.model))
        config = build(GenerationConfig, {"max_length": room}, settings)
        ids, _ = generate_text(self.model, memory, self.tokenizer.vocabulary, config, objective=objective)
        return [self.tokenizer.decode(text) for text in ids]

    def _write_by_masks(self, images: Sequence[AnyImage], settings: dict[str, Any]) -> list[str]:
        room = min(build(GenerationConfig).max_length, self.config.data.max_length)
        config = build(GenerationConfig, {"max_length": room}, settings)
        words = self.tokenizer.vocabulary
        pixels = Images(self._pixels(images).pixels.to(self.device))
        found = trim(generate_masked(self.model, pixels, words, config).ids, 1, words.sep)
        return [self.tokenizer.decode(text) for text in found]

    def _embed(self, wanted: Embed, parts: Iterator[tuple[Sequence[AnyImage] | None, Sequence[str] | None]]) -> Tensor:
        if self.model.space() is None:
            raise ValueError(
                f"this checkpoint has no common space of images and texts ({self._objectives}); "
                "pretrain with objective itc"
            )
        found = []
        for part in parts:
            with torch.inference_mode():
                found.append(self._run([wanted], *part)[wanted].float())
        vectors = _stack(found, self.model.config.embed.width)
        # Half precision keeps the norm to three digits only.
        return vectors if next(self.model.parameters()).dtype == torch.float32 else F.normalize(vectors, dim=-1)

    def _run(self, passes: Sequence[Pass], images: Sequence[AnyImage] | None, texts: Sequence[str] | None) -> Any:
        """The results of passes over images and texts, by name."""
        batch = Batch(
            images={} if images is None else {"clean": self._pixels(images)},
            texts={} if texts is None else {"clean": self._ids(texts)},
        )
        return self.model.run(passes, batch.to(self.device))

    @cached_property
    def _transform(self) -> EvalTransform:
        side = self.model.config.vision.image_size
        return EvalTransform(self.config.data.transform.model_copy(update={"image_size": side}))

    def _pixels(self, images: Sequence[AnyImage]) -> Images:
        pixels = [self._transform(read_image(image)) for image in images]
        if self._transform.config.crop == "none":  # images of their own aspect ratios (ViLT)
            vision: Any = self.model.vision  # `patch`, whose positions are then interpolated for each image
            return pad_images(pixels, vision.patch_side)
        return Images(torch.stack(pixels))

    def _ids(self, texts: Sequence[str]) -> Texts:
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"texts should be strings, not {type(wrong[0]).__name__}: {wrong[0]!r:.60}")
        length = self.config.data.max_length
        return pad_texts(
            prefixed(self.tokenizer, texts, self.config.data.prefix, length),
            "full",
            self.tokenizer.vocabulary.pad,
            length,
        )


ABILITIES = ("embed_images", "embed_texts", "classify", "match", "answer", "caption")
"""What a model may be able to do, as the methods of ``Loaded`` are called."""


def abilities(config: LoadedConfig) -> set[str]:
    """Name what a model of these objectives can do."""
    objectives = config.objectives.values()
    kinds = {one.kind for one in objectives}
    memories = {getattr(one, "memory", None) for one in objectives if one.kind == "lm"}
    images = getattr(config.model.fusion, "images", "one")
    known = {
        "match": bool(kinds & {"itm", "rank"}),
        "answer": ("answer" in kinds and images == "one") or "fused" in memories,
        "caption": bool(memories & {"image", "beside"} or "seq2seq_mlm" in kinds)
        or ("fused" in memories and config.model.answers_instructions),
    }
    known |= dict.fromkeys(ABILITIES[:3], any(one.trains_embed for one in objectives))
    return {name for name, has in known.items() if has}


def _listed(items: Sequence[Any], name: str) -> list[Any]:
    if isinstance(items, str | Path | Image.Image):
        raise ValueError(f"{name} should be a list, not one {type(items).__name__}; write [...] around it")
    return list(items)


def _words(items: Sequence[Any], name: str) -> list[str]:
    """What is chosen from: a list of strings, at least one."""
    found = _listed(items, name)
    if not found:
        raise ValueError(f"{name} is empty; give at least one")
    if wrong := [one for one in found if not isinstance(one, str)]:
        raise ValueError(f"{name} should be strings, not {type(wrong[0]).__name__}: {wrong[0]!r:.60}")
    return found


def _parts(items: Sequence[Any], name: str, batch_size: int) -> Iterator[list[Any]]:
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} should be at least 1")
    items = _listed(items, name)
    return (items[first : first + batch_size] for first in range(0, len(items), batch_size))


def _pairs(
    images: Sequence[AnyImage], texts: Sequence[str], name: str, batch_size: int
) -> Iterator[tuple[list[AnyImage], list[str]]]:
    images, texts = _listed(images, "images"), _listed(texts, name)
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images but {len(texts)} {name}; give one of each for every pair")
    return zip(_parts(images, "images", batch_size), _parts(texts, name, batch_size), strict=True)


def _stack(found: list[Tensor], width: int) -> Tensor:
    """All rows on the CPU, as an ordinary tensor (one made in inference mode cannot be trained on)."""
    if not found:
        return torch.zeros((0, width) if width else 0)
    return torch.cat([rows.cpu() for rows in found])


def _on(texts: Texts, device: torch.device) -> Texts:
    return Batch(texts={"": texts}).to(device).texts[""]
