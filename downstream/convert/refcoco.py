"""RefCOCO, RefCOCO+ and RefCOCOg: refs(unc).p, refs(umd).p or refs(google).p with their instances.json -> our rows."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from downstream.convert.files import list_in, read_json
from downstream.convert.types import Bad, Row

SPLITS = ("train", "val", "test", "testA", "testB")


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of plain lists, dicts, texts and numbers; whatever names a class or function is refused.

    A pickle may call any function it names, so that reading a foreign one runs foreign code.
    """

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        """Refuse."""
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which plain data do not need")

    def persistent_load(self, pid: Any) -> NoReturn:
        """Refuse."""
        raise pickle.UnpicklingError("it refers to objects outside of it")


def read_plain_pickle(path: Path) -> Any:
    """Return the lists, dicts, texts and numbers of a pickle file, Python 2's included.

    Raises:
        ValueError: it cannot be read, or holds anything else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; check the path") from error
    try:
        return PlainUnpickler(io.BytesIO(content), encoding="utf-8", errors="replace").load()
    except Exception as error:  # a broken pickle raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a pickle of plain data ({reason}); give the official refs(...).p") from error


def refcoco(refs: Path, instances: Path, detections: Path | None = None) -> Iterator[Row | Bad]:
    """RefCOCO, RefCOCO+ or RefCOCOg (splits by unc, umd or google), one row an expression; images of COCO's train2014.

    Args:
        refs: refs(unc).p, refs(umd).p or refs(google).p.
        instances: the instances.json beside it.
        detections: detected boxes to choose from: image id -> boxes, or COCO results; else all annotated objects.
    """
    listed = read_plain_pickle(refs)
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ValueError(f"{refs}: not a list of refs; give the official refs(unc).p, refs(umd).p or refs(google).p")
    images = {one.get("id"): one for one in list_in(instances, "images", "the instances.json beside the refs")}
    objects = {one.get("id"): one for one in list_in(instances, "annotations", "the instances.json beside the refs")}
    names = {
        one.get("id"): one.get("name") for one in list_in(instances, "categories", "the instances.json beside the refs")
    }
    boxes: dict[Any, list[list[float]]] = defaultdict(list)
    if detections is not None:
        boxes |= _detected(detections)
    else:
        for one in objects.values():
            if one.get("bbox"):
                boxes[one.get("image_id")].append(one["bbox"])
    for ref in listed:
        yield from _rows(ref, images, objects, names, boxes)


def _rows(
    ref: Mapping[str, Any],
    images: Mapping[Any, Mapping[str, Any]],
    objects: Mapping[Any, Mapping[str, Any]],
    names: Mapping[Any, Any],
    boxes: Mapping[Any, list[list[float]]],
) -> Iterator[Row | Bad]:
    """The rows of one ref, one a sentence."""
    key = f"ref {ref.get('ref_id')}"
    image, true = images.get(ref.get("image_id")), objects.get(ref.get("ann_id"))
    if image is None or not image.get("file_name"):
        yield Bad(key, "its image is not in instances.json")
        return
    if true is None or not true.get("bbox"):
        yield Bad(key, "its object has no box in instances.json")
        return
    if ref.get("split") not in SPLITS:
        yield Bad(key, f"split {ref.get('split')!r} is none of {', '.join(SPLITS)}")
        return
    sentences = ref.get("sentences") or []
    if not sentences:
        yield Bad(key, "no sentences")
    for sentence in sentences:
        text = str(sentence.get("sent") or sentence.get("raw") or "").strip()
        if not text:
            yield Bad(f"{key}, sentence {sentence.get('sent_id')}", "empty expression")
            continue
        row: Row = {"image": image["file_name"], "text": text, "box": true["bbox"]}
        row |= {name: image[name] for name in ("width", "height") if name in image}
        row |= {"boxes": boxes.get(image["id"], []), "split": ref["split"], "image_id": image["id"]}
        row |= {"ref_id": ref.get("ref_id"), "sent_id": sentence.get("sent_id"), "ann_id": ref.get("ann_id")}
        yield row | ({"category": names[true["category_id"]]} if true.get("category_id") in names else {})


def _detected(path: Path) -> dict[Any, list[list[float]]]:
    """Boxes of each image id: of MAttNet's and ALBEF's form, or of COCO's results."""
    content = read_json(path)
    found: dict[Any, list[list[float]]] = defaultdict(list)
    try:
        if isinstance(content, dict):
            for image, several in content.items():
                found[int(image)] = [
                    list(map(float, one["box"] if isinstance(one, dict) else one[:4])) for one in several
                ]
        else:
            for one in content:
                found[int(one["image_id"])].append(list(map(float, one.get("bbox") or one["box"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: neither image id -> list of boxes nor a list of COCO results ({error}); give detected boxes"
        ) from error
    return found
