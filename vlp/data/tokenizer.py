"""Text to ids: transformers' fast tokenizers, open_clip's BPE, or a WordPiece trained on the recipe's captions.

All give the same form, ``cls ... sep``, with the places where words begin. Tokenizers pickle: loader workers use them.
Shapes: L text length.
"""

from __future__ import annotations

import json
import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from encoders.types import Vocabulary
from vlp.config import Config

logger = logging.getLogger(__name__)

_OPEN_CLIP = "open_clip:"
_OPEN_CLIP_FILE = "open_clip_tokenizer.json"
_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_ALPHABET = 1000  # characters, as in BERT's own training; rarer ones make their words unknown

Ids = npt.NDArray[np.int64]


class TokenizerConfig(Config):
    """Where the tokenizer comes from."""

    source: str = "train"
    """`train`: a WordPiece from the training captions; else a transformers tokenizer (folder or hub id), or
    `open_clip:MODEL` for CLIP's BPE."""
    size: int = Field(default=8192, ge=64)
    """train: largest number of words and pieces."""
    min_frequency: int = Field(default=2, ge=1)
    """train: pieces that the captions hold less often are left out."""
    lowercase: bool = True
    """train: ignore case and accents."""


class Tokenizer(ABC):
    """Text <-> ids.

    Attributes:
        vocabulary: Size and special ids.
    """

    vocabulary: Vocabulary

    def encode(self, text: str, max_length: int) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Tokenise one text.

        Args:
            text: The text.
            max_length: Most ids, the two special ones included; what is longer is cut at its end.

        Returns:
            ids: [L] int64, ``cls ... sep``.
            word_starts: [L] bool, True where a word begins; False at special ids and at pieces that go on a word.
        """
        assert max_length >= 2, max_length
        pieces, starts = self._pieces(text, max_length - 2)
        ids = np.array([self.vocabulary.cls, *pieces[: max_length - 2], self.vocabulary.sep], dtype=np.int64)
        word_starts = np.array([False, *starts[: max_length - 2], False])
        return ids, word_starts & ~np.isin(ids, list(self.vocabulary.special))

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; special ids are left out.

        Args:
            ids: [L], a list, array or tensor.
        """
        kept = [i for i in (int(each) for each in ids) if i not in self.vocabulary.special]
        return self._join(kept).strip()

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write what ``load_tokenizer`` needs into ``folder``, which is made if it is not there."""

    @abstractmethod
    def _pieces(self, text: str, limit: int) -> tuple[list[int], list[bool]]:
        """Ids without special ones and where words begin, at least the first ``limit`` of them."""

    @abstractmethod
    def _join(self, ids: list[int]) -> str: ...


class TransformersTokenizer(Tokenizer):
    """A fast tokenizer of transformers.

    ``cls`` is its cls token or else its bos token, ``sep`` its sep or else its eos token; a generated text begins with
    bos (or cls) and ends with eos (or sep). Without a pad token ``sep`` pads, which is never attended.

    Args:
        tokenizer: Any with a Rust backend (it knows which pieces form a word).
        source: Its name, for errors.

    Raises:
        ValueError: If it is a slow one, or has no token to begin or end a text with.
    """

    def __init__(self, tokenizer: Any, source: str):
        if not tokenizer.is_fast:
            raise ValueError(
                f"data.tokenizer.source '{source}' is a slow tokenizer, which cannot tell words from pieces; "
                "convert it with transformers to a tokenizer.json, or use another"
            )
        self._tokenizer = tokenizer
        self.vocabulary = _vocabulary(tokenizer, source)
        expected = [self.vocabulary.cls, *tokenizer("a", add_special_tokens=False).input_ids, self.vocabulary.sep]
        if (own := list(tokenizer("a").input_ids)) != expected:
            logger.warning("tokenizer %s itself encodes 'a' as %s, but encoders here get %s", source, own, expected)

    def save(self, folder: str | Path) -> None:
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
        starts = [word is not None and word != before for before, word in zip([None, *words[:-1]], words)]
        return list(encoded.input_ids), starts

    def _join(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True))


def _vocabulary(tokenizer: Any, source: str) -> Vocabulary:
    def first(*ids: int | None) -> int | None:
        return next((i for i in ids if i is not None), None)

    cls = first(tokenizer.cls_token_id, tokenizer.bos_token_id)
    sep = first(tokenizer.sep_token_id, tokenizer.eos_token_id)
    if cls is None or sep is None:
        missing = "begin (cls or bos)" if cls is None else "end (sep or eos)"
        raise ValueError(
            f"data.tokenizer.source '{source}' has no token to {missing} a text with; use a tokenizer that has, "
            "such as BERT's, RoBERTa's or CLIP's, or train one"
        )
    return Vocabulary(
        # Added tokens may leave holes, so that the number of tokens is less than the ids need.
        size=max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1),
        pad=sep if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        cls=cls,
        sep=sep,
        mask=tokenizer.mask_token_id,
        bos=cls if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos=sep if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
    )


class OpenClipTokenizer(Tokenizer):
    """CLIP's BPE as open_clip ships it: ``<start_of_text> ... <end_of_text>``, padded with 0, without a mask token.

    Args:
        model: Name of an open_clip model that uses it, such as ``ViT-B-32``.

    Raises:
        ValueError: If there is no such model, or it has another tokenizer.
    """

    def __init__(self, model: str):
        import open_clip  # takes seconds, and is only needed here
        from open_clip.tokenizer import SimpleTokenizer

        if model not in open_clip.list_models():
            raise ValueError(
                f"data.tokenizer.source '{_OPEN_CLIP}{model}': open_clip has no model '{model}'; try ViT-B-32"
            )
        text = (open_clip.get_model_config(model) or {}).get("text_cfg", {})
        if name := text.get("hf_tokenizer_name"):
            raise ValueError(
                f"data.tokenizer.source '{_OPEN_CLIP}{model}' stands for the tokenizer '{name}'; write that name"
            )
        bpe = open_clip.get_tokenizer(model)
        if not isinstance(bpe, SimpleTokenizer):
            raise ValueError(f"data.tokenizer.source '{_OPEN_CLIP}{model}' is not CLIP's BPE; try open_clip:ViT-B-32")
        self._model, self._bpe = model, bpe
        start, end = bpe.sot_token_id, bpe.eot_token_id
        self.vocabulary = Vocabulary(bpe.vocab_size, pad=0, cls=start, sep=end, mask=None, bos=start, eos=end)

    def __reduce__(self) -> Any:
        return OpenClipTokenizer, (self._model,)

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / _OPEN_CLIP_FILE).write_text(json.dumps({"model": self._model}) + "\n", encoding="utf-8")

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
    if config.source == "train":
        return TransformersTokenizer(train_wordpiece(config, captions), "train")
    if config.source.startswith(_OPEN_CLIP):
        return OpenClipTokenizer(config.source.removeprefix(_OPEN_CLIP))
    return _from_transformers(config.source)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load what ``Tokenizer.save`` wrote, or any folder of a transformers tokenizer.

    Raises:
        ValueError: If there is no tokenizer in ``folder``.
    """
    file = Path(folder) / _OPEN_CLIP_FILE
    if file.is_file():
        return OpenClipTokenizer(json.loads(file.read_text(encoding="utf-8"))["model"])
    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer: there is no folder '{folder}'; check the path")
    return _from_transformers(str(folder))


def _from_transformers(source: str) -> TransformersTokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    # What is missing or unreadable shows as any of these, often with advice over several lines.
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"data.tokenizer.source '{source}' cannot be loaded: {reason}; give a folder with tokenizer files, a hub "
            "id (needs the network once), open_clip:MODEL, or train"
        ) from error
    return TransformersTokenizer(tokenizer, source)


def train_wordpiece(config: TokenizerConfig, captions: Iterable[str]) -> Any:
    """Train a WordPiece and return it as a ``PreTrainedTokenizerFast`` that splits and joins as BERT's does.

    Raises:
        ValueError: If there is no word in ``captions``.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(lowercase=config.lowercase), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for caption in captions:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
    if not words:
        raise ValueError(
            "data.tokenizer.source train found no captions to train on; set data.train, or name a tokenizer folder"
        )
    words, alphabet = _known_words(words, limit=min(_ALPHABET, (config.size - len(_SPECIAL)) // 2))
    # Left to itself the trainer numbers characters in the order of a hash table, which differs from process to process
    # and decides between merges of equal count. Given as "special" tokens they keep the order they stand in here.
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.size,
        min_frequency=config.min_frequency,
        special_tokens=[*_SPECIAL.values(), *alphabet],
        show_progress=False,
    )
    trained = Backend(models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with _one_thread():
        trained.train_from_iterator(_repeat(words), trainer)
    vocabulary = trained.get_vocab(with_added_tokens=True)
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    backend.decoder = decoders.WordPiece()
    logger.info("tokenizer: %d words and pieces from %d different words", len(vocabulary), len(words))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_SPECIAL)


def _known_words(words: Mapping[str, int], limit: int) -> tuple[Counter[str], list[str]]:
    """The words made of the ``limit`` most frequent characters, and their alphabet: c at a start, ##c within."""
    frequency: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            frequency[character] += count
    allowed = set(sorted(frequency, key=lambda character: (-frequency[character], character))[:limit])
    known = Counter({word: words[word] for word in sorted(words) if allowed.issuperset(word)})
    first = {character for word in known for character in word}  # a piece within needs its character alone, too
    within = {character for word in known for character in word[1:]}
    return known, [*sorted(first), *(f"##{character}" for character in sorted(within))]


def _repeat(words: Mapping[str, int]) -> Iterator[str]:
    """Each word as often as it was counted, in lines of at most 1000."""
    for word, count in words.items():
        for begin in range(0, count, 1000):
            yield " ".join([word] * min(1000, count - begin))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train without threads: after their use tokenizers warns in every forked loader worker."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
