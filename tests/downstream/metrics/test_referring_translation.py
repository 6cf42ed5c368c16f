"""IoU against the definition of the published evaluations, BLEU against its formula, METEOR's absence in words."""

import math
from collections import Counter

import numpy as np
import pytest

from downstream.metrics import translation
from downstream.metrics.referring import found, iou
from downstream.metrics.translation import bleu4, meteor


def pixel_iou(left, right):
    """`computeIoU` as MAttNet, ALBEF and X-VLM define it: x + w - 1 is a box's last column, and it counts."""
    low = [max(left[i], right[i]) for i in (0, 1)]
    high = [min(left[i] + left[i + 2] - 1, right[i] + right[i + 2] - 1) for i in (0, 1)]
    common = math.prod(b - a + 1 for a, b in zip(low, high)) if all(a < b for a, b in zip(low, high)) else 0
    return common / (left[2] * left[3] + right[2] * right[3] - common)


def test_iou_equals_the_published_one():
    draw = np.random.default_rng(0)
    for _ in range(500):
        left, right = ([*draw.uniform(0, 60, 2), *draw.uniform(20, 90, 2)] for _ in range(2))
        if pixel_iou(left, right) > 0:
            assert iou(left, right) == pytest.approx(pixel_iou(left, right), abs=1e-6)
    assert iou([0, 0, 10, 10], [20, 20, 5, 5]) == 0.0 and iou([0, 0, 0, 0], [0, 0, 0, 0]) == 0.0


def test_half_is_found():
    assert found([0, 0, 10, 10], [0, 0, 10, 20]) and not found([0, 0, 10, 10], [0, 0, 10, 20.1])


def test_bleu_is_the_corpus_formula():
    pytest.importorskip("sacrebleu")
    said = ["ein mann mit hut steht am see", "zwei hunde laufen im schnee"]
    true = [["ein mann mit hut steht an einem see", "ein mann am see"], ["zwei hunde rennen durch den schnee"]]

    def grams(words, n):
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    precision, length, reference = [], 0, 0
    for n in range(1, 5):
        right = total = 0
        for one, given in zip(said, true):
            most = Counter()
            for each in given:
                most |= grams(each.split(), n)
            mine = grams(one.split(), n)
            right, total = right + sum((mine & most).values()), total + sum(mine.values())
        precision.append(right / total)
    for one, given in zip(said, true):
        length += len(one.split())
        reference += min((abs(len(each.split()) - len(one.split())), len(each.split())) for each in given)[1]
    wanted = math.exp(min(0, 1 - reference / length)) * math.prod(precision) ** 0.25
    score, signature = bleu4(said, true)
    assert score == pytest.approx(wanted, abs=1e-6) and "tok:13a" in signature
    assert bleu4(["EIN MANN MIT HUT"], [["ein Mann mit Hut"]], lowercase=True)[0] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no sentences"):
        bleu4([], [])


def test_meteor_says_why_it_was_not_computed(monkeypatch):
    assert meteor(["a"], [["a"]], "xx") == (
        None,
        "METEOR: not computed, it knows en, cz, de, es, fr and not 'xx' (task.language)",
    )
    monkeypatch.setattr(translation.shutil, "which", lambda _: None)
    assert meteor(["a"], [["a"]], "en") == (None, "METEOR: not computed, there is no Java on this machine")
    monkeypatch.setattr(translation.shutil, "which", lambda _: "java")
    assert (
        meteor(["a"], [["a"]], "de")[1] == "METEOR: not computed, German needs its jar; name it with --task.meteor-jar"
    )
    assert "there is no file no.jar" in meteor(["a"], [["a"]], "de", "no.jar")[1]


def test_meteor_runs_the_jar(monkeypatch, tmp_path):
    """A program in Java's place shows what it is given; METEOR's last line holds the score."""
    java = tmp_path / "java"
    java.write_text(
        '#!/bin/sh\n[ "$7 $8 $9" = "de -norm -r" ] || { echo "bad $*" >&2; exit 1; }\n'
        f'cp "$4" {tmp_path}/said; cp "$5" {tmp_path}/true\necho "Final score:            0.4375"\n'
    )
    java.chmod(0o755)
    (tmp_path / "meteor-1.5.jar").write_text("")
    monkeypatch.setattr(translation.shutil, "which", lambda _: str(java))
    said, true = ["Ein  Mann", "Zwei"], [["Ein Herr", "Ein Mann"], ["Drei"]]
    score, how = meteor(said, true, "de", str(tmp_path / "meteor-1.5.jar"))
    assert score == 0.4375 and how == "METEOR: meteor-1.5.jar, German, normalised"
    assert (tmp_path / "said").read_text() == "Ein Mann\nZwei\n"
    assert (tmp_path / "true").read_text() == "Ein Herr\nEin Mann\nDrei\nDrei\n"
    java.write_text("#!/bin/sh\necho Error: no memory >&2; exit 1\n")
    assert meteor(said, true, "de", str(tmp_path / "meteor-1.5.jar")) == (
        None,
        "METEOR: not computed, meteor-1.5.jar failed: Error: no memory",
    )
