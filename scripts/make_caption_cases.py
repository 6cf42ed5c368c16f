# ruff: noqa: SIM905  (word lists read better as one string)
"""Make the stored cases that prove the caption metrics equal to pycocoevalcap, and the tokeniser close to the Java one.

    python scripts/make_caption_cases.py FOLDER

FOLDER is where pycocoevalcap's wheel was unpacked (`pip download --no-deps pycocoevalcap` and unzip). numpy and a
`java` command are needed. Writes caption_cases.json and ptb_pairs.json in tests/downstream/metrics/, from a fixed seed.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "downstream" / "metrics"
NOUNS = "cat dog man woman child bus train pizza clock zebra bench kite laptop 猫 café señor naïve-art t-shirt".split()
VERBS = "sits stands runs jumps eats holds rides watches flies sleeps is looks".split()
PLACES = "street beach kitchen field room park table snow bridge station".split()
ADJECTIVES = "red blue big small old young striped wooden shiny empty crowded (tiny)".split()
TRICKY = (
    "don't it's can't o'clock U.S. Dr. $5.50 10:30 50% 1/2 black-and-white 3-year-old e.g. (left) “old” 'new'".split()
)
TRICKY += "dogs' man's — ... ; !! A&B no. 1,000 w/ and/or #5 a.m. 1990's café Mr. St. 4x4 cannot gonna -- : ,".split()


def caption(rng: random.Random) -> list[str]:
    """A sentence of the kind people write under photos; now and then very short, very long or repetitive."""
    words = ["a", rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(VERBS), "in", "the", rng.choice(PLACES)]
    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        words += ["and", "a", rng.choice(NOUNS), rng.choice(VERBS)]
    if rng.random() < 0.15:
        words = words[: rng.randint(1, 4)]
    if rng.random() < 0.15:
        words += [rng.choice(words)] * rng.randint(1, 6)
    return words


def variation(rng: random.Random, words: list[str]) -> list[str]:
    """The sentence with some words changed, dropped or swapped, so that n-grams match in part."""
    words = [rng.choice(NOUNS + ADJECTIVES) if rng.random() < 0.2 else word for word in words if rng.random() > 0.1]
    if len(words) > 3 and rng.random() < 0.3:
        i = rng.randrange(len(words) - 1)
        words[i], words[i + 1] = words[i + 1], words[i]
    return words or ["a"]


def case(rng: random.Random, images: int) -> dict:
    """Candidates and one to five references for each of so many images."""
    candidates, references = [], []
    for _ in range(images):
        truth = caption(rng)
        references.append([" ".join(variation(rng, truth)) for _ in range(rng.randint(1, 5))])
        kind = rng.random()
        candidate = truth if kind < 0.15 else caption(rng) if kind < 0.35 else variation(rng, truth)
        candidates.append(references[-1][0] if kind > 0.9 else " ".join(candidate))
    if rng.random() < 0.3:
        candidates[rng.randrange(images)] = ""
    if images > 1 and rng.random() < 0.1:
        references[rng.randrange(images)][0] = ""
    return {"candidates": candidates, "references": references}


def scored(given: dict) -> dict:
    """The case with pycocoevalcap's corpus and per-sample numbers."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    res = {i: [text] for i, text in enumerate(given["candidates"])}
    gts = dict(enumerate(given["references"]))
    result: dict = dict(given)
    for name, scorer in (("cider_d", Cider()), ("rouge_l", Rouge())):
        corpus, each = scorer.compute_score(gts, res)
        result[name] = [float(corpus), [round(float(x), 10) for x in each]]
    corpus, each = Bleu(4).compute_score(gts, res, verbose=0)
    result["bleu"] = [[float(x) for x in corpus], [[round(float(x), 10) for x in order] for order in each]]
    return result


def java_tokens(folder: Path, sentences: list[str]) -> list[str]:
    """What pycocoevalcap's PTBTokenizer makes of each sentence: the same command, the same list of removed tokens."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.write("\n".join(sentences))
        file.flush()
        jar = folder / "pycocoevalcap" / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
        command = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", str(jar)]
        command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", file.name]
        out = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    lines = out.split("\n")[: len(sentences)]
    return [" ".join(w for w in line.rstrip().split(" ") if w not in PUNCTUATIONS) for line in lines]


def write(name: str, rows: list) -> None:
    """One row a line, so that a change can be read."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (FOLDER / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    rng = random.Random(0)
    cases = [scored(case(rng, rng.choice([1, 2, 3, 5, 8]))) for _ in range(72)]
    # and one corpus of a size at which its document frequencies matter
    write("caption_cases.json", [*cases, scored(case(random.Random(1), 240))])
    sentences = (FOLDER / "ptb_sentences.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    sentences = [sentence for sentence in sentences if sentence.strip()]
    for _ in range(250):
        words = [rng.choice(TRICKY) if rng.random() < 0.25 else word for word in caption(rng)]
        ending = rng.choice(["", ".", "!", "...", " .", ","])
        sentences.append(" ".join(words).capitalize() + ending)
    write("ptb_pairs.json", list(zip(sentences, java_tokens(folder, sentences), strict=True)))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
