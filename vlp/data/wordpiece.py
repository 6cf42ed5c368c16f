"""Training a WordPiece on captions: the same captions in any order give the same vocabulary."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_ALPHABET = 1000  # characters, as in BERT's own training; rarer ones make their words unknown


def train_wordpiece(captions: Iterable[str], *, size: int, min_frequency: int, lowercase: bool) -> Any:
    """Train a WordPiece and return it as a ``PreTrainedTokenizerFast`` that splits and joins as BERT's does.

    Args:
        captions: Texts, read once.
        size: Largest number of words and pieces.
        min_frequency: Pieces that the captions hold less often are left out.
        lowercase: Ignore case and accents.

    Raises:
        ValueError: If there is no word in ``captions``.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for caption in captions:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)))
    if not words:
        raise ValueError(
            "data.tokenizer.source train found no captions to train on; name data with captions by data.train, "
            "their column by data.text, or a tokenizer folder"
        )
    words, alphabet = _known_words(words, limit=min(_ALPHABET, (size - len(_SPECIAL)) // 2))
    # Left to itself the trainer numbers characters in the order of a hash table, which differs from process to process
    # and decides between merges of equal count. Given as "special" tokens they keep the order they stand in here.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
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
