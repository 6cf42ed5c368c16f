"""CMU-MOSI, MOSEI and tables like theirs -> rows of the task sentiment."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from downstream.convert.types import Bad, Row


def mosi(annotations: Path) -> Iterator[Row | Bad]:
    """CMU-MOSI, MOSEI: label.csv of the usual packages; images VIDEO/CLIP.jpg, a frame of each clip.

    Args:
        annotations: csv with the columns video_id, clip_id, text, label and, where there is one, mode (the split). Such
            is MMSA's label.csv for MOSI, MOSEI and CH-SIMS.

    Yields:
        image, text, label (a number), clip, split.

    Raises:
        ValueError: the file is not of the format.
    """
    try:
        with annotations.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = {"video_id", "clip_id", "text", "label"} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"{annotations}: no column {', '.join(sorted(missing))}; give the label.csv")
            for entry in reader:
                yield _mosi_row(entry)
    except OSError as error:
        raise ValueError(f"{annotations}: {error.strerror}; check the path") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{annotations}: not a csv table in UTF-8 ({error}); give the label.csv") from error


def _mosi_row(entry: dict[str, str | None]) -> Row | Bad:
    clip = f"{entry['video_id']}/{entry['clip_id']}"
    text = (entry["text"] or "").strip()
    if not text:
        return Bad(clip, "no field text")
    try:
        label = float(entry["label"] or "")
    except ValueError:
        return Bad(clip, "label is not a number")
    if not math.isfinite(label):
        return Bad(clip, "label is not a number")
    row: Row = {"image": f"{clip}.jpg", "text": text, "label": label, "clip": clip}
    return row | ({"split": entry["mode"]} if entry.get("mode") else {})
