"""Captions that are alike: false ones that are hard to tell from the true one (Lin et al. 2020, InterBERT).

Alike are captions by the cosine of their TF-IDF vectors. All of a data set are read once, when a run starts, and kept
as arrays that workers share. What comes of it depends on the data alone, so a resumed run finds the same.
Shapes: S samples, W words, P words of samples.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlp.data.batch import stable_hash
from vlp.data.group import Groups, without_images
from vlp.data.reader import BadSample, Reader, decode_texts
from vlp.data.records import read_words

logger = logging.getLogger(__name__)

COMMON = 0.1
"""Words that more than this share of the samples have say nothing, and would cost the most."""


@dataclass(frozen=True)
class AlikeCaptions:
    """The captions of every sample as one TF-IDF vector, word by word.

    It takes 8 bytes for every word of a sample that is not common: 0.2 GB for CC3M, and about five times that while it
    is made. A look at it takes 8 bytes for every sample, and time in proportion to these: 10 ms among three million.
    """

    hashes: npt.NDArray[np.int64]
    """[W] of the words, ascending."""
    starts: npt.NDArray[np.int64]
    """[W + 1] where each word's samples begin."""
    samples: npt.NDArray[np.int32]
    """[P] samples with each word, ascending."""
    weights: npt.NDArray[np.float32]
    """[P] of the word in the unit-norm vector of that sample."""
    number: int
    """S."""

    def nearest(self, index: int, text: str, most: int) -> npt.NDArray[np.int64]:
        """Return up to ``most`` samples whose captions are the most like a text, the most alike first.

        Args:
            index: of the sample whose text it is, which is left out.
            text: a caption.
            most: of them; those that share no word with it are none.
        """
        scores = np.zeros(self.number)
        for word, count in Counter(words_of(text)).items():
            hashed = stable_hash(word)
            at = int(np.searchsorted(self.hashes, hashed))
            if at == len(self.hashes) or self.hashes[at] != hashed:
                continue
            with_it = slice(self.starts[at], self.starts[at + 1])
            rarity = idf(np.array([with_it.stop - with_it.start]), self.number)[0]
            # A sample has a word once here, so that plain indexing adds all. The text's own length changes no order.
            scores[self.samples[with_it]] += count * rarity * self.weights[with_it]
        scores[index] = 0
        found = np.flatnonzero(scores)
        if len(found) > most:  # the last of them by a threshold, so that what is equally alike is cut by its number
            least = np.partition(scores[found], -most)[-most]
            found = found[scores[found] >= least]
        return found[np.argsort(-scores[found], kind="stable")[:most]]


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case, without what stands between them."""
    return re.findall(r"\w+", text.lower())


def idf(having: npt.NDArray[np.int64], number: int) -> npt.NDArray[np.float64]:
    """How rare words are that ``having`` [W] of ``number`` samples have: ln((1 + S) / (1 + n)) + 1."""
    return np.log((1 + number) / (1 + having)) + 1


def read_alike(reader: Reader, groups: Groups | None, text: str | None) -> AlikeCaptions:
    """Read all captions; no image is decoded, and what cannot be read has none, for the loader to count.

    Args:
        reader: the data.
        groups: what counts as a sample; None: each one of the reader.
        text: member or field of the captions; None: guessed.
    """
    number = len(reader) if groups is None else len(groups)
    logger.info("reading %d samples' captions, to find those that are alike", number)
    return alike_captions(_captions(reader, [i] if groups is None else groups[i], text) for i in range(number))


def _captions(reader: Reader, indices: Iterable[int], text: str | None) -> list[str]:
    found: list[str] = []
    for index in indices:
        try:
            found += decode_texts(without_images(read_words(reader, int(index))), text=text)
        except BadSample:
            continue
    return found


def alike_captions(captions: Iterable[Iterable[str]]) -> AlikeCaptions:
    """Make the vectors of samples from the captions of each."""
    known: dict[str, int] = {}
    words, samples, counts, number = array("i"), array("i"), array("H"), 0
    for number, each in enumerate(captions, 1):
        for word, count in Counter(word for caption in each for word in words_of(caption)).items():
            words.append(known.setdefault(word, len(known)))
            samples.append(number - 1)
            counts.append(min(count, 65535))
    hashes = np.fromiter(map(stable_hash, known), dtype=np.int64, count=len(known))
    order = np.argsort(hashes, kind="stable")
    rank = np.empty(len(known), dtype=np.int32)
    rank[order] = np.arange(len(known), dtype=np.int32)
    of_word, of_sample = rank[np.asarray(words, dtype=np.int32)], np.asarray(samples, dtype=np.int32)
    having = np.bincount(of_word, minlength=len(known))
    kept = (having <= max(1, COMMON * number))[of_word]
    of_word, of_sample = of_word[kept], of_sample[kept]
    weight = np.asarray(counts, dtype=np.float32)[kept] * idf(having, number)[of_word]
    weight /= np.sqrt(np.bincount(of_sample, weight**2, minlength=number))[of_sample]
    by_word = np.argsort(of_word, kind="stable")  # samples stay in their order
    starts = np.concatenate([[0], np.cumsum(np.bincount(of_word, minlength=len(known)))]).astype(np.int64)
    return AlikeCaptions(hashes[order], starts, of_sample[by_word], weight[by_word].astype(np.float32), number)
