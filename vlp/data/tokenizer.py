"""Text to ids: transformers' fast tokenizers, open_clip's BPE, or a WordPiece trained on the recipe's captions.

All give the same form, ``cls ... sep`` (or ``... sep``, as T5's family has it), with the places where words begin.
Tokenizers pickle: loader workers use them. Shapes: L text length.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from encoders.sources import local_source
from encoders.types import Vocabulary
from vlp.config import Config, build
from vlp.data.cleaning import CleanKind, clean_text
from vlp.data.tokenizer_files import add_places, load_backend, read_json, sentinels_of
from vlp.data.wordpiece import train_wordpiece

logger = logging.getLogger(__name__)

_OPEN_CLIP = "open_clip:"
OPEN_CLIP_FILE = "open_clip_tokenizer.json"
_RULES_FILE = "tokenizer_rules.json"
_MASK = "<|mask|>"

Ids = npt.NDArray[np.int64]


class TextRules(Config):
    """What becomes of a text before and after its tokenizer; a checkpoint's tokenizer folder holds it."""

    clean: CleanKind = "none"
    """Cleaning of the text, as the family's own code does it."""
    max_words: int | None = Field(default=None, ge=1)
    """Words after which a text is cut, before it is tokenised (ALBEF 30, BLIP 50)."""
    fixed_length: int | None = Field(default=None, ge=2)
    """Every text gets this many ids (or max_length, if that is less), and its padding is attended, as SigLIP was
    trained; none = padding to the longest of a batch, not attended."""


class TokenizerConfig(TextRules):
    """Where the tokenizer comes from."""

    source: str = "train"
    """`train`: a WordPiece from the training captions; else a transformers tokenizer (folder, file or hub id), or
    `open_clip:MODEL` for the tokenizer of that model of open_clip."""
    size: int = Field(default=8192, ge=64)
    """train: largest number of words and pieces."""
    min_frequency: int = Field(default=2, ge=1)
    """train: pieces that the captions hold less often are left out."""
    lowercase: bool = True
    """train: ignore case and accents."""
    added_tokens: tuple[str, ...] = ()
    """Special tokens that get the ids after the last one, in this order (BLIP: [DEC], [ENC])."""
    add_mask: bool = False
    """Give a tokenizer without a token for masked words one, which gets the id after the last (DeCLIP, of CLIP's)."""
    codes: int = Field(default=0, ge=0)
    """Words `<code_0>`, `<code_1>`, ... for this many codes of image patches, behind the last word (OFA 8192)."""
    bins: int = Field(default=0, ge=0)
    """Words `<bin_0>`, `<bin_1>`, ... for this many places along each side of an image, behind these (OFA 1000)."""
    bos_token: str | int | None = None
    """Token that begins a generated text, or its id; none = the tokenizer's own."""


class Tokenizer(ABC):
    """Text <-> ids.

    Attributes:
        vocabulary: Size and special ids.
        rules: What becomes of a text before and after.
        begins: Whether texts begin with ``vocabulary.cls``.
    """

    vocabulary: Vocabulary
    rules: TextRules = TextRules()
    begins: bool = True

    def encode(self, text: str, max_length: int) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Tokenise one text.

        Args:
            text: The text.
            max_length: Most ids, special ones included; what is longer is cut at its end.

        Returns:
            ids: [L] int64, ``cls ... sep``, then padding where the rules say ``fixed_length``.
            word_starts: [L] bool, True where a word begins; False at special ids and at pieces that go on a word.
        """
        assert max_length >= 2, max_length
        length = min(max_length, self.rules.fixed_length or max_length)
        first = [self.vocabulary.cls] if self.begins else []
        room = length - len(first) - 1
        pieces, starts = self._pieces(clean_text(text, self.rules.clean, self.rules.max_words), room)
        ids = [*first, *pieces[:room], self.vocabulary.sep]
        if self.rules.fixed_length is not None:
            ids += [self.vocabulary.pad] * (length - len(ids))
        found = np.array(ids, dtype=np.int64)
        word_starts = np.zeros(len(ids), dtype=np.bool_)
        word_starts[len(first) : len(first) + min(len(pieces), room)] = starts[:room]
        return found, word_starts & ~np.isin(found, list(self.vocabulary.special))

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; special ids are left out.

        Args:
            ids: [L], a list, array or tensor.
        """
        kept = [i for i in (int(each) for each in ids) if i not in self.vocabulary.special]
        return self._join(kept).strip()

    def save(self, folder: str | Path) -> None:
        """Write what ``load_tokenizer`` needs into ``folder``, which is made if it is not there."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._save(Path(folder))
        rules, file = self.rules.model_dump(exclude_defaults=True), Path(folder) / _RULES_FILE
        if rules:
            file.write_text(json.dumps(rules) + "\n", encoding="utf-8")
        else:
            file.unlink(missing_ok=True)

    @abstractmethod
    def _save(self, folder: Path) -> None: ...

    @abstractmethod
    def _pieces(self, text: str, limit: int) -> tuple[list[int], list[bool]]:
        """Ids without special ones and where words begin, at least the first ``limit`` of them."""

    @abstractmethod
    def _join(self, ids: list[int]) -> str: ...


class TransformersTokenizer(Tokenizer):
    """A fast tokenizer of transformers.

    ``cls`` is its cls token or else its bos token, ``sep`` its sep or else its eos token; a generated text begins with
    bos (or cls) and ends with eos (or sep). Without a pad token ``sep`` pads, which is never attended. One that by
    itself ends texts and does not begin them (T5's, SigLIP's) is taken so; its generated texts begin with pad.

    Args:
        tokenizer: Any with a Rust backend (it knows which pieces form a word).
        source: Its name, for errors.
        rules: What becomes of a text before and after.

    Raises:
        ValueError: If it is a slow one, or has no token to begin or end a text with.
    """

    def __init__(self, tokenizer: Any, source: str, rules: TextRules | None = None):
        if not tokenizer.is_fast:
            raise ValueError(
                f"data.tokenizer.source '{source}' is a slow tokenizer, which cannot tell words from pieces; "
                "convert it with transformers to a tokenizer.json, or use another"
            )
        self._tokenizer, self.rules = tokenizer, rules or TextRules()
        own, pieces = (list(tokenizer("a", add_special_tokens=special).input_ids) for special in (True, False))
        ends = {tokenizer.sep_token_id, tokenizer.eos_token_id} - {None}
        self.begins = not (own[:-1] == pieces and ends.issuperset(own[-1:]))
        self.vocabulary = _vocabulary(tokenizer, source, self.begins)
        expected = [*([self.vocabulary.cls] if self.begins else []), *pieces, self.vocabulary.sep]
        if own != expected:
            logger.warning("tokenizer %s itself encodes 'a' as %s, but encoders here get %s", source, own, expected)

    def encode_pair(self, first: str, second: str, max_length: int) -> tuple[Ids, Ids]:
        """Tokenise two texts as one input; the longer one is cut first.

        Returns:
            ids: [L] int64, in the tokenizer's own form, as ``cls first sep second sep``.
            segments: [L] int64, 1 at the second text where the tokenizer tells them apart, else 0.
        """
        texts = [clean_text(text, self.rules.clean, self.rules.max_words) for text in (first, second)]
        encoded = self._tokenizer(*texts, truncation="longest_first", max_length=max_length)
        ids = np.array(encoded.input_ids, dtype=np.int64)
        return ids, np.array(encoded.get("token_type_ids", np.zeros_like(ids)), dtype=np.int64)

    def _save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(str(folder))

    def _pieces(self, text: str, limit: int) -> tuple[list[int], list[bool]]:
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            truncation=limit > 0,
            max_length=max(limit, 1),
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        words = encoded.word_ids(0)
        # A tokenizer that does not split at spaces (Gemma's) still marks where a word begins.
        starts = [
            word is not None and (word != before or piece.startswith("▁"))
            for before, word, piece in zip([None, *words[:-1]], words, encoded.tokens(0))
        ]
        return list(encoded.input_ids), starts

    def _join(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True))


def _vocabulary(tokenizer: Any, source: str, begins: bool) -> Vocabulary:
    def first(*ids: int | None) -> int | None:
        return next((i for i in ids if i is not None), None)

    sep = first(tokenizer.sep_token_id, tokenizer.eos_token_id)
    pad = first(tokenizer.pad_token_id, sep)
    cls = first(tokenizer.cls_token_id, tokenizer.bos_token_id, None if begins else pad)
    if cls is None or sep is None or pad is None:
        missing = "begin (cls or bos)" if cls is None else "end (sep or eos)"
        raise ValueError(
            f"data.tokenizer.source '{source}' has no token to {missing} a text with; use a tokenizer that has, "
            "such as BERT's, RoBERTa's or CLIP's, or train one"
        )
    return Vocabulary(
        # Added tokens may leave holes, so that the number of tokens is less than the ids need.
        size=max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1),
        pad=pad,
        cls=cls,
        sep=sep,
        mask=tokenizer.mask_token_id,
        bos=cls if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos=sep if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
        sentinels=sentinels_of(tokenizer.get_vocab()),
    )


class OpenClipTokenizer(Tokenizer):
    """CLIP's BPE as open_clip ships it: ``<start_of_text> ... <end_of_text>``, padded with 0.

    Args:
        rules: What becomes of a text before and after; its cleaning stands in for open_clip's own, `lower`, if any.
        mask: Have a mask token, which CLIP's own has not, behind the last word.
    """

    def __init__(self, rules: TextRules | None = None, mask: bool = False):
        from open_clip.tokenizer import SimpleTokenizer  # takes seconds, and is only needed here

        self.rules = rules or TextRules()
        self._bpe = SimpleTokenizer(clean="lower" if self.rules.clean == "none" else "whitespace")
        start, end = self._bpe.sot_token_id, self._bpe.eot_token_id
        size = self._bpe.vocab_size
        own = size if mask else None
        self.vocabulary = Vocabulary(size + mask, pad=0, cls=start, sep=end, mask=own, bos=start, eos=end)

    def __reduce__(self) -> Any:
        return OpenClipTokenizer, (self.rules, self.vocabulary.mask is not None)

    def as_transformers(self) -> Any:
        """Return the same vocabulary and merges as a ``CLIPTokenizer``, which does not mend HTML entities."""
        from transformers import CLIPTokenizer

        merges = sorted(self._bpe.bpe_ranks, key=self._bpe.bpe_ranks.__getitem__)
        named = {self.vocabulary.cls: "<|startoftext|>", self.vocabulary.sep: "<|endoftext|>"}
        found = CLIPTokenizer({named.get(i, piece): i for piece, i in self._bpe.encoder.items()}, merges)
        if self.vocabulary.mask is not None:
            found.add_special_tokens({"mask_token": _MASK})
        return found

    def _save(self, folder: Path) -> None:
        said = {"tokenizer": "clip_bpe", **({} if self.vocabulary.mask is None else {"mask": True})}
        (folder / OPEN_CLIP_FILE).write_text(json.dumps(said) + "\n", encoding="utf-8")

    def _pieces(self, text: str, limit: int) -> tuple[list[int], list[bool]]:
        ids = self._bpe.encode(text)
        ends = [self._bpe.decoder[i].endswith("</w>") for i in ids]
        return ids, [True, *ends[:-1]] if ids else []

    def _join(self, ids: list[int]) -> str:
        return str(self._bpe.decode(ids))


def build_tokenizer(config: TokenizerConfig, captions: Iterable[str]) -> Tokenizer:
    """Make the recipe's tokenizer.

    Args:
        config: Where it comes from.
        captions: Texts to train it on; read once, and only if it is trained. The same texts in any order give the
            same vocabulary.

    Raises:
        ValueError: If the source cannot be loaded, or there are no captions to train on.
    """
    asked = config.model_dump(include=set(TextRules.model_fields), exclude_defaults=True)
    tokenizer: Tokenizer
    if config.source == "train":
        cleaned = (clean_text(caption, config.clean, config.max_words) for caption in captions)
        backend = train_wordpiece(
            cleaned, size=config.size, min_frequency=config.min_frequency, lowercase=config.lowercase
        )
        tokenizer = TransformersTokenizer(backend, "train", build(TextRules, asked))
    elif config.source.startswith(_OPEN_CLIP):
        tokenizer = _open_clip(config.source, asked)
    elif Path(config.source).is_dir():
        tokenizer = _from_folder(Path(config.source), asked)
    else:
        tokenizer = _from_transformers(local_source(config.source), asked)
    return _with_tokens(tokenizer, config)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load what ``Tokenizer.save`` wrote, or any folder of a transformers or open_clip tokenizer.

    Raises:
        ValueError: If there is no tokenizer in ``folder``.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer: there is no folder '{folder}'; check the path")
    return _from_folder(Path(folder), {})


def _from_folder(folder: Path, asked: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a folder and its rules, those that are ``asked`` for over them."""
    rules = {**read_json(folder / _RULES_FILE), **asked}
    if (folder / OPEN_CLIP_FILE).is_file():
        return OpenClipTokenizer(build(TextRules, rules), bool(read_json(folder / OPEN_CLIP_FILE).get("mask")))
    if config := read_json(folder / "open_clip_config.json"):
        return _by_text_config(config.get("model_cfg", {}).get("text_cfg", {}), str(folder), rules, local=True)
    return _from_transformers(str(folder), rules)


def _from_transformers(source: str, asked: Mapping[str, Any]) -> TransformersTokenizer:
    backend = load_backend(source)
    # In transformers this class cleans and pads in code of its own, which its tokenizer.json does not hold.
    named = {read_json(Path(source) / "tokenizer_config.json").get("tokenizer_class"), type(backend).__name__}
    own = {"clean": "siglip", "fixed_length": 64} if "SiglipTokenizer" in named else {}
    return TransformersTokenizer(backend, source, build(TextRules, {**own, **asked}))


def _open_clip(source: str, asked: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of one of open_clip's models, by its name."""
    import open_clip  # takes seconds, and is only needed here

    model = source.removeprefix(_OPEN_CLIP)
    if model not in open_clip.list_models():
        raise ValueError(f"data.tokenizer.source '{source}': open_clip has no model '{model}'; try ViT-B-32")
    return _by_text_config((open_clip.get_model_config(model) or {}).get("text_cfg", {}), source, asked)


def _by_text_config(text: Mapping[str, Any], source: str, asked: Mapping[str, Any], local: bool = False) -> Tokenizer:
    """The tokenizer that open_clip makes for the ``text_cfg`` of a model; its files lie in ``source`` if ``local``."""
    settings = dict(text.get("tokenizer_kwargs") or {})
    name = text.get("hf_tokenizer_name")
    own: dict[str, Any] = {"clean": settings.pop("clean", "whitespace" if name else "none")}
    if settings or text.get("tokenizer_mode"):
        known = ", ".join([*settings, *(["tokenizer_mode"] if text.get("tokenizer_mode") else [])])
        raise ValueError(f"data.tokenizer.source '{source}': its {known} is not known here; use another model's")
    if text.get("no_causal_mask") and not text.get("hf_model_name"):
        own["fixed_length"] = text.get("context_length", 77)  # such a text tower sees its padding
    rules = {**own, **asked}
    return _from_transformers(source if local else name, rules) if name else OpenClipTokenizer(build(TextRules, rules))


def _with_tokens(tokenizer: Tokenizer, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer with further special tokens, its bos token, and a mask token where one is asked for."""
    if config.add_mask and tokenizer.vocabulary.mask is None:
        if isinstance(tokenizer, OpenClipTokenizer):
            tokenizer = OpenClipTokenizer(tokenizer.rules, mask=True)
        elif isinstance(tokenizer, TransformersTokenizer):
            tokenizer._tokenizer.add_special_tokens({"mask_token": _MASK})
            tokenizer = TransformersTokenizer(tokenizer._tokenizer, config.source, tokenizer.rules)
    if not (config.added_tokens or config.codes or config.bins) and config.bos_token is None:
        return tokenizer
    if not isinstance(tokenizer, TransformersTokenizer):
        raise ValueError(
            "data.tokenizer.added_tokens, codes or bins: CLIP's BPE takes no further tokens; leave them out"
        )
    backend = tokenizer._tokenizer
    known = set(backend.get_vocab())
    backend.add_tokens(list(config.added_tokens), special_tokens=True)
    places = add_places(backend, config.codes, config.bins)
    # The library counts tokens to find the next id, which is taken if the vocabulary left one out (a word twice).
    ids = backend.get_vocab()
    if any(ids[token] < tokenizer.vocabulary.size for token in {*config.added_tokens, *places} - known):
        raise ValueError(
            f"data.tokenizer.added_tokens {config.added_tokens}: '{config.source}' has unused ids among its own; "
            "remove duplicate words from its vocabulary"
        )
    if config.bos_token is not None:
        begin = config.bos_token
        if isinstance(begin, int):
            begin = next((token for token, number in backend.get_vocab().items() if number == begin), f"id {begin}")
        if begin not in backend.get_vocab():
            raise ValueError(
                f"data.tokenizer.bos_token '{begin}' is not in the vocabulary; name it in "
                "data.tokenizer.added_tokens too"
            )
        backend.bos_token = begin
    return TransformersTokenizer(backend, config.source, tokenizer.rules)
