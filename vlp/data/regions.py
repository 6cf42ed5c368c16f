"""Regions that a detector found before: arrays beside a text -> the views of a batch's images.

Arrays are the members of `KEY.npz` (or a table's column with paths of such files), or `KEY.features.npy`,
`KEY.boxes.npy` and so on; :data:`NAMES` lists what they may be called. What is hidden of an image depends on the
sample's position alone.
Shapes: B images, R regions, F feature width, G values of a box, O outputs of a target, K predicted regions.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from encoders.types import Regions
from objectives.base import Draw, RegionMask, RegionView
from vlp.data.records import BadSample

Array: TypeAlias = npt.NDArray[Any]

NAMES: dict[str, tuple[str, ...]] = {
    "features": ("features",),
    "boxes": ("boxes", "bbox"),
    "relative": ("relative_boxes", "norm_bb"),
    "width": ("width", "image_w", "img_w", "image_width"),
    "height": ("height", "image_h", "img_h", "image_height"),
    "objects": ("objects", "objects_id"),
    "objects_scores": ("confidence", "objects_confidence", "objects_conf", "conf"),
    "attributes": ("attributes", "attrs_id"),
    "attributes_scores": ("attributes_confidence", "attrs_conf"),
    "classes": ("classes", "soft_labels", "cls_prob"),
}
"""What is read, by our name: names that it may have, as UNITER's, LXMERT's and the detectors' own files have them."""

_MULTIPLE = 8  # numbers of regions are rounded up to it, as lengths of texts are


@dataclass(frozen=True)
class RegionLayout:
    """What a model reads of an image's regions."""

    boxes: int
    """G, see :func:`geometry`."""
    number: int
    """Most regions of an image; of more, the most confident are taken, or the first where no confidence is given."""
    whole: bool = False
    """A region before them, which counts among them: the whole image, with the mean of their features (ViLBERT)."""
    targets: tuple[str, ...] = ()
    """What is predicted of regions, "classes", "objects" or "attributes" (features need not be named), and
    "NAME_scores" where confidences weigh it."""
    views: Mapping[str, RegionView | None] = field(default_factory=dict)
    """Views besides "clean" by name, and what they hide; None: nothing."""

    @property
    def replaces(self) -> bool:
        """Whether a view shows features of another image's regions."""
        return any(view is not None and view.replaces for view in self.views.values())


@dataclass(frozen=True)
class RegionArrays:
    """The regions of one image."""

    features: Array
    """[R, F] float32."""
    boxes: Array
    """[R, 4] float32, left, top, right, bottom as shares of the image's width and height."""
    targets: Mapping[str, Array] = field(default_factory=dict)
    """[R] or [R, O] by name."""
    other: Array | None = None
    """[S, F] features of another image's regions, where a view shows such."""


def geometry(boxes: Array, values: int) -> Array:
    """Relative corners [R, 4] -> what a model reads of them, [R, G].

    4: the corners (LXMERT); 5: and the area (ViLBERT, Unicoder-VL); 6: and width and height (Oscar); 7: and width,
    height and area (UNITER); 0: nothing (VisualBERT).
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    area = sides.prod(1, keepdims=True)
    more = {0: [], 4: [boxes], 5: [boxes, area], 6: [boxes, sides], 7: [boxes, sides, area]}[values]
    return np.concatenate([boxes[:, :0], *more], 1).astype(np.float32)


def read_regions(key: str, fields: Mapping[str, Any], layout: RegionLayout) -> RegionArrays:
    """Read one image's regions from what stands beside its text.

    Args:
        key: name of the sample, for errors.
        fields: the sample's; members with arrays as bytes.
        layout: what is needed of them.

    Raises:
        BadSample: arrays are missing, cannot be read, are not finite or do not fit each other.
    """
    arrays = _Arrays(key, fields)
    features = np.asarray(arrays.need("features"), dtype=np.float32)
    number = len(features)
    if features.ndim != 2 or number == 0:
        raise BadSample(key, f"features are {features.shape}, not regions x width")
    found = {"features": features, "boxes": _relative(arrays, number, layout.boxes > 0)}
    for name in layout.targets:
        found[name] = np.asarray(arrays.need(name))
    for name, array in found.items():
        if len(array) != number:
            raise BadSample(key, f"{number} regions have features, but {len(array)} have {name}")
        if not np.isfinite(array).all():
            raise BadSample(key, f"{name} of its regions are not finite")
    chosen = _chosen(number, layout.number - layout.whole, arrays.get("objects_scores"))
    found = {name: array[chosen] for name, array in found.items()}
    return RegionArrays(found.pop("features"), found.pop("boxes"), {name: _typed(found[name]) for name in found})


def region_members(fields: Mapping[str, Any]) -> list[str]:
    """Return the names of the members with a whole image's arrays each: ``npz``, or ``0.npz``, ``1.npz`` and so on."""
    numbers = sorted(int(name[:-4]) for name in fields if name.endswith(".npz") and name[:-4].isdecimal())
    return ["npz"] if "npz" in fields else [f"{number}.npz" for number in numbers]


def read_all_regions(key: str, fields: Mapping[str, Any], layout: RegionLayout) -> tuple[RegionArrays, ...]:
    """Read the regions of each of a sample's images, as ``read_regions`` does those of one.

    Raises:
        BadSample: as there.
    """
    names = region_members(fields)
    several = [{**fields, "npz": fields[name]} for name in names] if len(names) > 1 else [fields]
    return tuple(read_regions(key, each, layout) for each in several)


def missing_array(fields: Mapping[str, Any], layout: RegionLayout) -> str | None:
    """Return the first of our names of arrays that a model reads and an image's sample lacks; None if all are there.

    Raises:
        BadSample: arrays cannot be read.
    """
    members = region_members(fields)
    arrays = _Arrays("", {**fields, "npz": fields[members[0]]} if len(members) > 1 else fields)
    return next((name for name in ("features", *layout.targets) if arrays.get(name) is None), None)


def _chosen(number: int, most: int, confidence: Array | None) -> Array:
    """Indices of the regions that are taken, in their order."""
    if number <= most or confidence is None or len(confidence) != number:
        return np.arange(min(number, most))
    return np.sort(np.argsort(-confidence, kind="stable")[:most])


def _typed(array: Array) -> Array:
    """Classes as int64, anything else as float32."""
    return array.astype(np.int64 if array.dtype.kind in "iub" else np.float32)


def _relative(arrays: _Arrays, number: int, needed: bool) -> Array:
    """Boxes [R, 4] as shares of the image's sides."""
    given = arrays.get("relative")
    if given is not None:
        return np.asarray(given, dtype=np.float32)[:, :4]
    boxes = arrays.get("boxes") if not needed else arrays.need("boxes")
    if boxes is None:
        return np.zeros((number, 4), dtype=np.float32)
    sides = np.array([float(np.asarray(arrays.need(side)).item()) for side in ("width", "height")])
    if not (sides > 0).all():
        raise BadSample(arrays.key, f"its image is {sides[0]:g} x {sides[1]:g} pixels")
    return (np.asarray(boxes, dtype=np.float64)[:, :4] / np.tile(sides, 2)).astype(np.float32)


class _Arrays:
    """Arrays of one sample by our names, each read when it is asked for."""

    def __init__(self, key: str, fields: Mapping[str, Any]) -> None:
        self.key, self.fields = key, fields
        self.npz: Mapping[str, Array] = {}
        if isinstance(content := fields.get("npz"), bytes):
            self.npz = self._load(content, "npz")

    def _load(self, content: bytes, name: str) -> Any:
        try:
            return np.load(io.BytesIO(content), allow_pickle=False)
        except Exception as error:  # numpy, zipfile and zlib each have their own
            raise BadSample(self.key, f".{name} cannot be read: {error}") from error

    def get(self, name: str) -> Any:
        """An array or a number; None if there is none."""
        for theirs in NAMES[name]:
            if theirs in self.npz:
                try:
                    return self.npz[theirs]
                except Exception as error:
                    raise BadSample(self.key, f"{theirs} in .npz cannot be read: {error}") from error
            if isinstance(content := self.fields.get(f"{theirs}.npy"), bytes):
                return self._load(content, f"{theirs}.npy")
            if self.fields.get(theirs) is not None and name in ("width", "height"):
                return self.fields[theirs]
        return None

    def need(self, name: str) -> Any:
        """As ``get``, but it must be there."""
        if (found := self.get(name)) is None:
            known = (
                ", ".join(self.npz) or ", ".join(each for each in self.fields if each.endswith("npy")) or "no arrays"
            )
            raise BadSample(self.key, f"no {name} of regions; it has {known}")
        return found


def region_views(
    samples: Sequence[RegionArrays], positions: Sequence[int], layout: RegionLayout, draw: Draw
) -> dict[str, Regions]:
    """Lay the regions of a batch's images side by side: the view "clean", and every other one that is read.

    Args:
        samples: one an image.
        positions: each one's in the run, which key what is hidden.
        layout: what the model reads.
        draw: of the run.

    Returns:
        features [B, R, F], boxes [B, R, G], keep [B, R]; of views that hide regions also masked, predict [B, R],
        predict_at [K] and the targets.
    """
    found = {"clean": _pad(samples, [None] * len(samples), layout)}
    for name, view in layout.views.items():
        masks = [
            None if view is None else view.make(sample.boxes, draw.sample(f"image {name}", position))
            for sample, position in zip(samples, positions, strict=True)
        ]
        found[name] = found["clean"] if view is None else _pad(samples, masks, layout)
    return found


def _pad(samples: Sequence[RegionArrays], masks: Sequence[RegionMask | None], layout: RegionLayout) -> Regions:
    rows = [_row(sample, mask, layout) for sample, mask in zip(samples, masks, strict=True)]
    longest = max(len(row["features"]) for row in rows)
    length = max(longest, min(-(-longest // _MULTIPLE) * _MULTIPLE, layout.number))
    laid = {name: _stack([row[name] for row in rows], length) for name in rows[0]}
    features, boxes, keep = laid.pop("features"), laid.pop("boxes"), laid.pop("keep")
    if masks[0] is None:
        return Regions(features, boxes, keep)
    masked, predict = laid.pop("masked"), laid.pop("predict")
    at = predict.flatten().nonzero()[:, 0]
    at = torch.cat([at, at.new_full((-len(at) % _MULTIPLE or (0 if len(at) else _MULTIPLE),), -1)])
    targets = {name.removeprefix("target "): array for name, array in laid.items()}
    return Regions(features, boxes, keep, masked, predict=predict, predict_at=at, targets=targets)


def _row(sample: RegionArrays, mask: RegionMask | None, layout: RegionLayout) -> dict[str, Array]:
    """Arrays of one image before padding, the whole image first where it is wanted."""
    features, number = sample.features, len(sample.features)
    shown = np.ones(number, dtype=bool) if mask is None else ~mask.masked
    found: dict[str, Array] = {}
    if mask is not None:
        found = {"masked": mask.masked, "predict": mask.predict}
        found |= {f"target {name}": array for name, array in sample.targets.items()}
        if layout.replaces:
            found["target features"] = features
        swapped = mask.replaced >= 0
        if swapped.any():
            assert sample.other is not None
            features = features.copy()
            features[swapped] = sample.other[mask.replaced[swapped] % len(sample.other)]
    boxes = sample.boxes
    if layout.whole:
        # The mean is of what is shown: hidden features must not come back by it.
        mean = features[shown].mean(0, keepdims=True) if shown.any() else np.zeros_like(features[:1])
        features = np.concatenate([mean, features])
        boxes = np.concatenate([np.array([[0, 0, 1, 1]], dtype=np.float32), boxes])
        found = {name: np.concatenate([np.zeros_like(array[:1]), array]) for name, array in found.items()}
    keep = np.ones(len(features), dtype=bool)
    return {"features": features, "boxes": geometry(boxes, layout.boxes), "keep": keep, **found}


def _stack(arrays: Sequence[Array], length: int) -> Tensor:
    """Arrays [R, ...] of the same kind, zeros behind each -> [B, length, ...]."""
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"data: features or targets of regions differ in width, {sorted(shapes)}; use one detector")
    padded = np.zeros((len(arrays), length, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    for row, array in enumerate(arrays):
        padded[row, : len(array)] = array
    return torch.from_numpy(padded)


def with_other(regions: RegionArrays, other: RegionArrays) -> RegionArrays:
    """The regions, with another image's features to show in their place."""
    return replace(regions, other=other.features)
