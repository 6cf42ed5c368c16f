"""COCO, NoCaps and TextCaps captions, and Karpathy's splits of COCO and Flickr -> rows of captioning and retrieval.

A row is an image with all of its captions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from downstream.convert.files import lacking, list_in, list_of, object_in
from downstream.convert.types import Bad, Row

COCO = "captions_val2014.json or another file of COCO's caption format"
KARPATHY = "Karpathy's dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json"
TEXTCAPS = "TextCaps_0.1_train.json, ..._val.json or ..._test.json"


def coco_captions(annotations: Path, split: str | None = None) -> Iterator[Row | Bad]:
    """COCO captions_*.json, or image_info_test*.json without captions; images by their file name.

    Args:
        annotations: the file.
        split: written into each row.

    Yields:
        image, image_id, caption (a list; not where the file has no annotations), split.

    Raises:
        ValueError: the file is not of the format.
    """
    for entry, captions in _coco(annotations):
        if captions == [] or (reason := lacking(entry, "file_name")):
            yield Bad(str(entry.get("id")), "no caption" if captions == [] else str(reason))
            continue
        row: Row = {"image": entry["file_name"], "image_id": entry["id"]}
        yield row | ({} if captions is None else {"caption": captions}) | ({} if split is None else {"split": split})


def nocaps(annotations: Path) -> Iterator[Row | Bad]:
    """NoCaps: nocaps_val_4500_captions.json, or nocaps_{val,test}_image_info.json without captions.

    Args:
        annotations: the file.

    Yields:
        image, image_id (what submissions name), domain (in-domain, near-domain, out-domain; where the file has it),
        open_images_id, caption (a list).

    Raises:
        ValueError: the file is not of the format.
    """
    for entry, captions in _coco(annotations):
        if captions == [] or (reason := lacking(entry, "file_name")):
            yield Bad(str(entry.get("id")), "no caption" if captions == [] else str(reason))
            continue
        row: Row = {"image": entry["file_name"], "image_id": entry["id"]}
        row |= {name: entry[name] for name in ("open_images_id", "domain") if entry.get(name)}
        yield row | ({} if captions is None else {"caption": captions})


def _coco(path: Path) -> Iterator[tuple[dict[str, Any], list[str] | None]]:
    """Each image of a file of COCO's format and its captions; None for all where the file has no annotations."""
    found = object_in(path, COCO)
    images = list_of(found, path, "images", COCO)
    captions: defaultdict[Any, list[str]] = defaultdict(list)
    has_captions = "annotations" in found
    if has_captions:
        for one in list_of(found, path, "annotations", COCO):
            if not lacking(one, "caption"):
                captions[one.get("image_id")].append(" ".join(str(one["caption"]).split()))
        if not captions:
            raise ValueError(f"{path}: its annotations have no field 'caption'; give {COCO}")
    for entry in images:
        if "id" not in entry:
            raise ValueError(f"{path}: an image without 'id'; give {COCO}")
        yield entry, captions.get(entry["id"], []) if has_captions else None


def textcaps(annotations: Sequence[Path]) -> Iterator[Row | Bad]:
    """TextCaps: TextCaps_0.1_{train,val,test}.json; images train_images/ID.jpg, of test test_images/ID.jpg.

    Args:
        annotations: the files, one or several.

    Yields:
        image, image_id, caption (a list; not of test), split.

    Raises:
        ValueError: a file is not of the format.
    """
    rows: dict[Any, Row] = {}  # a file names an image once for each of its captions
    for path in annotations:
        for entry in list_in(path, "data", TEXTCAPS):
            if reason := lacking(entry, "image_id", "set_name"):
                yield Bad(str(entry.get("image_id")), reason)
                continue
            number, split = entry["image_id"], entry["set_name"]
            folder = "test_images" if split == "test" else "train_images"  # val's images are among those of train
            row = rows.setdefault(number, {"image": f"{folder}/{number}.jpg", "image_id": number, "split": split})
            told = entry.get("caption_str") or entry.get("reference_strs") or ()
            for caption in [told] if isinstance(told, str) else told:
                row.setdefault("caption", []).append(caption)
    for row in rows.values():
        yield row if "caption" in row or row["split"] == "test" else Bad(str(row["image_id"]), "no caption")


def karpathy(annotations: Path) -> Iterator[Row | Bad]:
    """Karpathy's splits: dataset_coco.json, dataset_flickr30k.json; splits train, restval (COCO's), val, test.

    Train on COCO as published: ``--data.where '{split: [train, restval]}'``. The order is the file's, which COCO's
    five folds of 1,000 test images follow.

    Args:
        annotations: the file.

    Yields:
        image, image_id, caption (a list), sentids (of each caption), split.

    Raises:
        ValueError: the file is not of the format.
    """
    for entry in list_in(annotations, "images", KARPATHY):
        number = entry.get("cocoid", entry.get("imgid"))
        sentences = [one for one in entry.get("sentences") or () if isinstance(one, dict) and one.get("raw")]
        if (reason := lacking(entry, "filename", "split")) or not sentences:
            yield Bad(str(number), reason or "no caption")
            continue
        folder = entry.get("filepath")
        yield {
            "image": f"{folder}/{entry['filename']}" if folder else entry["filename"],
            "image_id": number,
            "caption": [" ".join(one["raw"].split()) for one in sentences],
            "sentids": [one.get("sentid") for one in sentences],
            "split": entry["split"],
        }
