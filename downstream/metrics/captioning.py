"""Caption metrics in pure Python: CIDEr-D, BLEU-1..4 and ROUGE-L, number for number those of pycocoevalcap.

Every function takes tokenised text: a string of tokens separated by white space, or a list of tokens.
`caption_metrics` takes raw captions and tokenises them first. Scales are those of the reference: BLEU and ROUGE-L lie
in [0, 1], CIDEr-D in [0, 10] (papers print 100 times it: 1.2 here is "CIDEr 120").
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from downstream.metrics.tokenize import tokenize

Text = str | Sequence[str]
Ngram = tuple[str, ...]
Key = TypeVar("Key")

ORDERS = 4  # n-grams of one to four tokens, in BLEU and in CIDEr alike
SIGMA = 6.0  # tokens; width of CIDEr-D's penalty on the difference in length
BETA = 1.2  # weight of recall over precision in ROUGE-L


def cider_d(
    candidates: Sequence[Text],
    references: Sequence[Sequence[Text]],
    df: tuple[Mapping[Ngram, float], int] | None = None,
) -> tuple[float, list[float]]:
    """CIDEr-D (Vedantam, Zitnick, Parikh: "CIDEr", CVPR 2015, section 7) of each candidate and their mean.

    For n = 1..4, with g_n the tf-idf vector of n-grams (term counts times log(images / df)) and l the length:

        CIDEr-D_n(c, S) = 10 / |S| * sum over s in S of
            exp(-(l(c) - l(s))^2 / (2 * 6^2)) * min(g_n(c), g_n(s)) . g_n(s) / (|g_n(c)| |g_n(s)|)

    and CIDEr-D is the mean over n. pycocoevalcap's class for it is called `Cider`. Its factor 10, the paper's too, is
    kept: 10 is the best score, and papers print 100 times this number ("CIDEr 120" is 1.2 here). Two details are
    the reference's, not the paper's: term counts are not divided by the caption's length (which matters only in
    the minimum), and the length is the number of bigrams.

    Args:
        candidates: One tokenised candidate per image.
        references: For each image its tokenised references, at least one.
        df: Document frequencies from `document_frequencies` on another corpus; None takes them from `references`,
            as the reference does. Then one image alone scores 0, since log(1 / 1) = 0.

    Returns:
        The mean over images, and the score of each image, all in [0, 10].

    Raises:
        ValueError: Nothing to score, lengths differ, or an image has no reference.
    """
    _check(candidates, references)
    frequencies, images = document_frequencies(references) if df is None else df
    log_images = math.log(images)

    def vector(text: Text) -> tuple[dict[Ngram, float], list[float], int]:
        counts = _ngrams(_tokens(text))
        weights = {g: tf * (log_images - math.log(max(1.0, frequencies.get(g, 0.0)))) for g, tf in counts.items()}
        squares = [0.0] * ORDERS
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        bigrams = sum(tf for g, tf in counts.items() if len(g) == 2)
        return weights, [math.sqrt(s) for s in squares], bigrams

    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        hyp, hyp_norm, hyp_length = vector(candidate)
        total = 0.0
        for reference in refs:
            ref, ref_norm, ref_length = vector(reference)
            dots = [0.0] * ORDERS
            for ngram, weight in hyp.items():
                if ngram in ref:
                    dots[len(ngram) - 1] += min(weight, ref[ngram]) * ref[ngram]
            cosines = (d / (h * r) if h and r else d for d, h, r in zip(dots, hyp_norm, ref_norm, strict=True))
            total += sum(cosines) * math.exp(-((hyp_length - ref_length) ** 2) / (2 * SIGMA**2))
        scores.append(10.0 * total / ORDERS / len(refs))
    return sum(scores) / len(scores), scores


def document_frequencies(references: Sequence[Sequence[Text]]) -> tuple[dict[Ngram, float], int]:
    """For every n-gram the number of images with it in any reference, and the number of images (for `cider_d`)."""
    frequencies: Counter[Ngram] = Counter()
    for refs in references:
        frequencies.update({ngram for reference in refs for ngram in _ngrams(_tokens(reference))})
    return {ngram: float(count) for ngram, count in frequencies.items()}, len(references)


def bleu(candidates: Sequence[Text], references: Sequence[Sequence[Text]]) -> tuple[list[float], list[list[float]]]:
    """BLEU-1..4 (Papineni et al., ACL 2002, equations 2 and 3) of the corpus and of each sample, as COCO counts them.

    Clipped precisions are summed over the corpus before the geometric mean; the brevity penalty exp(1 - r / c) compares
    the summed candidate length c with r, the sum of the reference lengths closest to their candidate (the shorter
    one on a tie). A sample's own BLEU is not smoothed beyond the reference's 1e-15 in each numerator: without a
    matching 4-gram its BLEU-4 is near zero, not undefined. The mean of samples is not the corpus BLEU.

    Args:
        candidates: One tokenised candidate per image.
        references: For each image its tokenised references, at least one.

    Returns:
        `[B1, B2, B3, B4]` of the corpus, and for each order the list of all samples' scores; in [0, 1].

    Raises:
        ValueError: Nothing to score, lengths differ, or an image has no reference.
    """
    _check(candidates, references)
    total = [0] * (2 + 2 * ORDERS)
    per_sample: list[list[float]] = [[] for _ in range(ORDERS)]
    for candidate, refs in zip(candidates, references, strict=True):
        statistics = _bleu_statistics(_tokens(candidate), [_tokens(reference) for reference in refs])
        total = [a + b for a, b in zip(total, statistics, strict=True)]
        for order, score in enumerate(_bleu_from(statistics)):
            per_sample[order].append(score)
    return _bleu_from(total), per_sample


def rouge_l(candidates: Sequence[Text], references: Sequence[Sequence[Text]]) -> tuple[float, list[float]]:
    """ROUGE-L (Lin, "ROUGE", 2004, equations 2 to 4) of each candidate and their mean, with COCO's beta of 1.2.

    `F = (1 + beta^2) P R / (R + beta^2 P)` where P and R are the longest common subsequence over the candidate's and
    the reference's length; with several references the best P and the best R are taken, maybe from different ones.

    Args:
        candidates: One tokenised candidate per image.
        references: For each image its tokenised references, at least one.

    Returns:
        The mean over images, and the score of each image, in [0, 1].

    Raises:
        ValueError: Nothing to score, lengths differ, or an image has no reference.
    """
    _check(candidates, references)
    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        # The reference splits at single blanks, so an empty caption is one empty token there: two empty captions agree.
        hyp = _tokens(candidate) or [""]
        tokenised = [_tokens(reference) or [""] for reference in refs]
        common = [_common_subsequence(ref, hyp) for ref in tokenised]
        precision = max(common) / len(hyp)
        recall = max(lcs / len(ref) for lcs, ref in zip(common, tokenised, strict=True))
        denominator = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / denominator if denominator else 0.0)
    return sum(scores) / len(scores), scores


def caption_metrics(candidates: Mapping[Key, str], references: Mapping[Key, Sequence[str]]) -> dict[str, float]:
    """All caption metrics of raw captions, tokenised as the COCO evaluation does.

    Args:
        candidates: For each image key its caption.
        references: For each image key its reference captions, at least one.

    Returns:
        "CIDEr-D" in [0, 10]; "BLEU-1" to "BLEU-4" and "ROUGE-L" in [0, 1]: the reference's scales.

    Raises:
        ValueError: The keys differ, there are none, or an image has no reference.
    """
    if candidates.keys() != references.keys():
        odd = sorted(map(str, candidates.keys() ^ references.keys()))
        raise ValueError(f"captions: {len(odd)} keys (first {odd[0]!r}) have no candidate or no references; give both")
    hyps = [tokenize(caption) for caption in candidates.values()]
    refs = [[tokenize(caption) for caption in references[key]] for key in candidates]
    scores = {"CIDEr-D": cider_d(hyps, refs)[0]}
    scores |= {f"BLEU-{n}": score for n, score in enumerate(bleu(hyps, refs)[0], start=1)}
    return scores | {"ROUGE-L": rouge_l(hyps, refs)[0]}


def _tokens(text: Text) -> list[str]:
    return text.split() if isinstance(text, str) else list(text)


def _ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))


def _check(candidates: Sequence[Text], references: Sequence[Sequence[Text]]) -> None:
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"captions: {len(candidates)} candidates for {len(references)} lists of references; give one list each"
        )
    empty = next((i for i, refs in enumerate(references) if not refs), None)
    if empty is not None:
        raise ValueError(f"captions: image number {empty} has no reference caption; drop the image or add one")


def _bleu_statistics(candidate: Sequence[str], references: Iterable[Sequence[str]]) -> list[int]:
    """Candidate length, closest reference length, then matched and possible n-grams of each order."""
    references = list(references)
    closest = min((abs(len(ref) - len(candidate)), len(ref)) for ref in references)[1]
    allowed: Counter[Ngram] = Counter()
    for ref in references:
        allowed |= _ngrams(ref)  # union keeps the largest count of each n-gram
    matched = [0] * ORDERS
    for ngram, count in (_ngrams(candidate) & allowed).items():
        matched[len(ngram) - 1] += count
    possible = [max(0, len(candidate) - n) for n in range(ORDERS)]
    return [len(candidate), closest, *matched, *possible]


def _bleu_from(statistics: Sequence[int]) -> list[float]:
    length, closest, *counts = statistics
    tiny, small = 1e-15, 1e-9  # the reference's guards against 0 / 0; they decide the score of empty captions
    ratio = (length + tiny) / (closest + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(ORDERS):
        product *= (counts[n] + tiny) / (counts[ORDERS + n] + small)
        scores.append(product ** (1 / (n + 1)) * brevity)
    return scores


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for token in left:
        diagonal = 0
        for j, other in enumerate(right, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]
