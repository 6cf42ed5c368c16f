"""Referring expressions: the share of expressions whose box is found (Yu et al. 2016, RefCOCO; IoU at least 0.5).

Boxes are (left, top, width, height) in pixels, as COCO stores them.
"""

from collections.abc import Sequence
from typing import TypeAlias

Box: TypeAlias = Sequence[float]

FOUND_AT = 0.5


def iou(left: Box, right: Box) -> float:
    """Return the intersection of two boxes over their union; 0 where neither has an area.

    On boxes that overlap by more than a pixel, equal to `computeIoU` of MAttNet's, ALBEF's and X-VLM's evaluation,
    which counts pixels (x + w - 1 is the last column) and takes smaller overlaps for none.
    """
    width = min(left[0] + left[2], right[0] + right[2]) - max(left[0], right[0])
    height = min(left[1] + left[3], right[1] + right[3]) - max(left[1], right[1])
    common = max(width, 0.0) * max(height, 0.0)
    union = left[2] * left[3] + right[2] * right[3] - common
    return common / union if union > 0 else 0.0


def found(predicted: Box, true: Box) -> bool:
    """Return whether a box counts as found: IoU at least 0.5, as ALBEF and X-VLM count (their `grounding_eval`)."""
    return iou(predicted, true) >= FOUND_AT
