"""Multi30k: parallel text files, a sentence a line, and the list of their images -> one row a sentence."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

from downstream.convert.types import Bad, Row


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, stripped, ``.gz`` or not.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give a UTF-8 text file, or it packed as .gz") from error
    # Not splitlines, which would also cut at the line separators of Unicode.
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def multi30k(image_list: Path, source: Path, target: Path, split: str | None = None) -> Iterator[Row | Bad]:
    """Multi30k, task 1: image and source sentence -> target sentence.

    Args:
        image_list: names of the images, a line each (image_splits/train.txt, ...).
        source: sentences to translate, a line each (raw/train.en.gz, ...).
        target: their translations (raw/train.de.gz, ...).
        split: name of the split; none = the source file's name.
    """
    images, sources, targets = (read_lines(path) for path in (image_list, source, target))
    if not len(images) == len(sources) == len(targets):
        raise ValueError(
            f"{image_list}: {len(images)} images, but {source.name} has {len(sources)} lines and {target.name} "
            f"{len(targets)}; give the files of one split"
        )
    split = split or source.name.split(".")[0]
    for number, (image, sentence, translation) in enumerate(zip(images, sources, targets, strict=True), 1):
        missing = [n for n, one in (("image", image), ("source", sentence), ("target", translation)) if not one]
        if missing:
            yield Bad(f"line {number}", f"no {' and '.join(missing)}")
            continue
        # COCO's list has the number of the caption behind the name of the image.
        yield {"image": image.split("#")[0], "source": sentence, "target": translation, "split": split}
