"""VQA accuracy as the official evaluation computes it (Antol et al., ICCV 2015; Goyal et al., CVPR 2017), in [0, 1].

The tables and the order of the steps follow the public evaluation code, its oddities included, since published numbers
contain them; each oddity is named where it stands.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

_NUMBERS = {"none": "0"} | {
    word: str(n)
    for n, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
_ARTICLES = frozenset({"a", "an", "the"})
# Contractions in their right spelling. The misspellings that are mapped to them leave out one apostrophe, or all: the
# official table is irregular, so it is written as "misspelling>right" only where dropping all apostrophes is not it.
_CONTRACTIONS_PLAIN = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_CONTRACTIONS_IRREGULAR = """
couldn'tve>couldn't've couldnt've>couldn't've hadnt've>hadn't've hadn'tve>hadn't've hed've>he'd've he'dve>he'd've
itd've>it'd've it'dve>it'd've mightnt've>mightn't've mightn'tve>mightn't've ow's'at>'ow's'at 'ows'at>'ow's'at
'ow'sat>'ow's'at shed've>she'd've she'dve>she'd've shouldnt've>shouldn't've shouldn'tve>shouldn't've
somebody'd>somebodyd somebodyd've>somebody'd've somebody'dve>somebody'd've someoned've>someone'd've
someone'dve>someone'd've somethingd've>something'd've something'dve>something'd've thered've>there'd've
there'dve>there'd've theyd've>they'd've they'dve>they'd've wed've>we'd've we'dve>we'd've whod've>who'd've
who'dve>who'd've wouldnt've>wouldn't've wouldn'tve>wouldn't've yall'll>y'all'll y'allll>y'all'll yall'd've>y'all'd've
y'alld've>y'all'd've y'all'dve>y'all'd've youd've>you'd've you'dve>you'd've
"""
_CONTRACTIONS = {right.replace("'", ""): right for right in _CONTRACTIONS_PLAIN.split()} | dict(
    pair.split(">") for pair in _CONTRACTIONS_IRREGULAR.split()
)  # the official entries with capitals (Im, Ive, Id've) are left out: words are lower-case by then, so they never apply
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")  # also after a digit: the official look-behind is misspelt and never applies
_DIGIT_COMMA = re.compile(r"\d,\d")


@dataclass(frozen=True)
class VqaResult:
    """VQA accuracy of a set of questions; every number is in [0, 1].

    Attributes:
        accuracy: Mean over questions.
        per_question: Score of each question, in the order given.
        per_answer_type: Mean by answer type ("yes/no", "number", "other").
        per_question_type: Mean by question type ("what color is the", ...).
    """

    accuracy: float
    per_question: tuple[float, ...]
    per_answer_type: dict[str, float]
    per_question_type: dict[str, float]


@lru_cache(maxsize=1 << 16)
def normalize_answer(answer: str) -> str:
    """An answer as the official evaluation compares it: punctuation, case, number words, articles, contractions.

    A mark that touches a blank somewhere in the answer disappears, any other becomes a blank; with a comma between
    two digits ("1,000") every mark disappears. A period goes unless a digit follows. Then lower-case, "none" and
    "zero" to "ten" become digits, the articles go, and contractions without apostrophes get them back.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    joined = _DIGIT_COMMA.search(text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if joined or touches else " ")
    # At most 32 periods go: the official call passes re.UNICODE (32) where the count belongs.
    stripped = _PERIOD.sub("", stripped, count=32)
    words = [_NUMBERS.get(word, word) for word in stripped.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official accuracy of one prediction: the mean over annotators of `min(1, matches among the others / 3)`.

    With the usual ten answers, 0, 1, 2, 3 and 4 or more matches give 0, 0.3, 0.6, 0.9 and 1. As in the official code,
    when all answers are the same string neither they nor the prediction are normalised. The official data always has
    ten answers; a question with a single one (easy-vqa, GQA) has no "others", so there the score is 1 if prediction and
    answer are equal after normalisation, else 0. Two or three answers cannot reach 1 under this rule.

    Args:
        prediction: The model's answer.
        answers: The annotators' answers, with repetitions.

    Returns:
        Score in [0, 1].

    Raises:
        ValueError: There are no answers.
    """
    if not answers:
        raise ValueError(
            "answers: none given, so the VQA accuracy is undefined; drop the question (test sets have none)"
        )
    clean = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
    if len(clean) == 1 or len(set(clean)) > 1:
        clean = [normalize_answer(answer) for answer in clean]
        prediction = normalize_answer(prediction)
    return _leave_one_out(clean.count(prediction), len(clean))


def soft_targets(answers: Sequence[str]) -> dict[str, float]:
    """The score of each distinct answer, as the target of answer classification (Teney et al., CVPR 2018).

    Args:
        answers: The annotators' answers, with repetitions.

    Returns:
        For each normalised answer the accuracy it would get: 0.3, 0.6, 0.9 or 1 with ten answers, 1 with a single one.
        Answers that are not named score 0.
    """
    counts = Counter(normalize_answer(answer) for answer in answers)
    return {answer: _leave_one_out(count, len(answers)) for answer, count in counts.items()}


def vqa_metrics(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    answer_types: Sequence[str] | None = None,
    question_types: Sequence[str] | None = None,
) -> VqaResult:
    """VQA accuracy over questions, also by answer type and by question type where these are given.

    Args:
        predictions: One answer per question.
        answers: The annotators' answers of each question.
        answer_types: One per question, or None.
        question_types: One per question, or None.

    Raises:
        ValueError: No questions, sequences of different lengths, or a question without answers.
    """
    if not predictions:
        raise ValueError("predictions: none given, so there is no accuracy to average; pass at least one question")
    sized = {"answers": answers, "answer_types": answer_types, "question_types": question_types}
    for field, values in sized.items():
        if values is not None and len(values) != len(predictions):
            raise ValueError(f"{field}: {len(values)} for {len(predictions)} predictions; give one per question")
    scores = tuple(vqa_accuracy(p, a) for p, a in zip(predictions, answers, strict=True))
    return VqaResult(
        accuracy=sum(scores) / len(scores),
        per_question=scores,
        per_answer_type=_means(scores, answer_types or ()),
        per_question_type=_means(scores, question_types or ()),
    )


def _leave_one_out(matches: int, total: int) -> float:
    """Mean over annotators of min(1, matches among the other annotators / 3), from counts alone."""
    if total == 1:
        return float(matches)
    agreeing = matches * min(3, matches - 1)  # an annotator who gave this answer is left out of the matches
    return (agreeing + (total - matches) * min(3, matches)) / (3 * total)


def _means(scores: Iterable[float], groups: Iterable[str]) -> dict[str, float]:
    members: defaultdict[str, list[float]] = defaultdict(list)
    for score, group in zip(scores, groups):
        members[group].append(score)
    return {group: sum(values) / len(values) for group, values in sorted(members.items())}
