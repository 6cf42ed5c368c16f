"""Translation: BLEU-4 over the corpus by sacrebleu (Post 2018), and METEOR 1.5 where there is Java.

Neither is computed here: numbers are comparable only if they come from the reference tools. sacrebleu is the extra
`translation`; METEOR is a jar, whose English pycocoevalcap has with it.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LANGUAGES = {"en": "English", "cz": "Czech", "de": "German", "es": "Spanish", "fr": "French"}
"""What METEOR has paraphrases of."""
JAR = "meteor-1.5.jar"


def need_sacrebleu() -> Any:
    """Return the library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise ValueError("task translation scores with sacrebleu; pip install 'vlp[translation]'") from error
    return sacrebleu


def bleu4(
    translations: Sequence[str], references: Sequence[Sequence[str]], *, lowercase: bool = False, tokenizer: str = "13a"
) -> tuple[float, str]:
    """Return BLEU-4 of a corpus in 0..1 (papers print 100 times it), and sacrebleu's signature.

    Args:
        translations: one a sentence.
        references: of each sentence, at least one.
        lowercase: ignore case, as much of the work on Multi30k does.
        tokenizer: sacrebleu's name of it.

    Raises:
        ValueError: sacrebleu is not installed, or there are no sentences.
    """
    if not translations:
        raise ValueError("translation: no sentences; give at least one")
    metric = need_sacrebleu().BLEU(lowercase=lowercase, tokenize=tokenizer)
    most = max(len(one) for one in references)
    # sacrebleu wants one list for each reference number; None where a sentence has fewer.
    columns = [[one[i] if i < len(one) else None for one in references] for i in range(most)]
    score = metric.corpus_score(list(translations), columns)
    return score.score / 100, str(metric.get_signature())


def meteor(
    translations: Sequence[str], references: Sequence[Sequence[str]], language: str, jar: str | None = None
) -> tuple[float | None, str]:
    """Return METEOR of a corpus in 0..1 and how it was computed; or None and why it was not.

    Args:
        translations: one a sentence.
        references: of each sentence, at least one.
        language: two letters.
        jar: meteor-1.5.jar with its data beside it; None: pycocoevalcap's, which knows English alone.
    """
    if language not in LANGUAGES:
        return None, f"METEOR: not computed, it knows {', '.join(LANGUAGES)} and not {language!r} (task.language)"
    if (java := shutil.which("java")) is None:
        return None, "METEOR: not computed, there is no Java on this machine"
    if jar is None:
        if language != "en":
            return None, f"METEOR: not computed, {LANGUAGES[language]} needs its jar; name it with --task.meteor-jar"
        if (found := _english_jar()) is None:
            return None, "METEOR: not computed; pip install 'vlp[caption]', or name its jar with --task.meteor-jar"
        jar = str(found)
    elif not Path(jar).is_file():
        return None, f"METEOR: not computed, there is no file {jar}"
    return _run(java, jar, translations, references, language)


def _english_jar() -> Path | None:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / "meteor" / JAR
    return path if path.is_file() else None


def _run(
    java: str, jar: str, translations: Sequence[str], references: Sequence[Sequence[str]], language: str
) -> tuple[float | None, str]:
    """METEOR's own command line, which takes the best reference of each: repeated ones change nothing."""
    most = max(len(one) for one in references)
    padded = [one for each in references for one in [*each, *[each[0]] * (most - len(each))]]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "translations", Path(folder) / "references"
        for path, lines in zip(files, (translations, padded), strict=True):
            path.write_text("".join(" ".join(line.split()) + "\n" for line in lines), encoding="utf-8")
        command = [java, "-Xmx2G", "-jar", jar, *map(str, files), "-l", language, "-norm", "-r", str(most)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    score = re.search(r"Final score:\s+([0-9.]+)", done.stdout)
    if done.returncode or score is None:
        reason = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        return None, f"METEOR: not computed, {Path(jar).name} failed: {reason}"
    return float(score[1]), f"METEOR: {Path(jar).name}, {LANGUAGES[language]}, normalised"
