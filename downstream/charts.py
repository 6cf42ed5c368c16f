"""Small line charts of losses: all the geometry, so that a template only has to draw it. Lengths in SVG units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 340, 212
LEFT, RIGHT, TOP, BOTTOM = 40, 48, 12, 38
"""Margins: tick labels on the left, the last value's label on the right, the axis label below."""

NONE = "\N{EN DASH}"
"""Stands for a number that there is not."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """One curve as lines and labels in a box of ``WIDTH`` x ``HEIGHT``, y downwards."""

    name: str
    description: str
    """What the picture shows, for those who cannot see it."""
    raw: str
    """Points of an SVG polyline: the values as recorded."""
    smooth: str
    """The same, lightly smoothed."""
    x_ticks: tuple[tuple[float, str], ...]
    """Place and label."""
    y_ticks: tuple[tuple[float, str], ...]
    chance: tuple[float, str] | None
    """Height of the chance level, and its label."""
    last: tuple[float, float, str]
    """Place of the last point, and its value."""

    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    width, height = WIDTH, HEIGHT


def draw(name: str, points: Points, chance: float | None, unit: str) -> Chart | None:
    """Lay out a curve; None if it has no finite point.

    Args:
        name: of the curve.
        points: (place on the x axis, value), in order.
        chance: level to compare with.
        unit: of the x axis, for the description.
    """
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return None
    xs, ys = [x for x, _ in points], [y for _, y in points]
    levels = ys if chance is None else [*ys, chance * 1.08]  # room for the label above the line
    low, high = min(levels), max(levels)
    y_ticks = ticks(0.0 if 0 <= low <= 0.7 * high else low, high, 4)
    x_ticks = ticks(0.0, max(xs), 4, whole=True)
    across, down = x_ticks[-1] or 1.0, y_ticks[-1] - y_ticks[0]

    def x_of(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * x / max(max(xs), 1e-9), 1)

    def y_of(y: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (y_ticks[-1] - y) / down, 1)

    def line(values: Sequence[float]) -> str:
        return " ".join(f"{x_of(x):g},{y_of(y):g}" for x, y in zip(xs, values, strict=True))

    description = f"{name}: from {number(ys[0])} to {number(ys[-1])} over {xs[-1]:,.0f} {unit}"
    return Chart(
        name,
        description if chance is None else f"{description}; chance is {number(chance)}",
        line(ys),
        line(smoothed(ys)),
        tuple((x_of(x), short(x, across)) for x in x_ticks if x <= max(xs) * 1.001),
        tuple((y_of(y), f"{y:g}") for y in y_ticks),
        None if chance is None else (y_of(chance), f"chance {number(chance)}"),
        (x_of(xs[-1]), y_of(ys[-1]), number(ys[-1])),
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Return means over a symmetric window of a twentieth of the curve, narrower at its ends: the ends stay exact."""
    reach, result = len(values) // 40, []
    for i in range(len(values)):
        k = min(reach, i, len(values) - 1 - i)
        result.append(math.fsum(values[i - k : i + k + 1]) / (2 * k + 1))
    return result


def ticks(low: float, high: float, intervals: int, whole: bool = False) -> list[float]:
    """Return round numbers that hold ``low`` and ``high`` between the first and the last, about ``intervals`` apart."""
    if high - low < 1e-9:
        high = low + max(abs(low), 1.0)
    rough = (high - low) / intervals
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float, largest: float) -> str:
    """Return a count as on an axis up to ``largest``: 40k, 1.5M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if largest >= 2 * size and value:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def number(value: float) -> str:
    """Return a plain number in at most four figures: 0.093, 1.47, 14, 1,234."""
    if not math.isfinite(value):
        return NONE
    value = round(value, 9)  # a computed 0.9999999999 is a 1
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3}f}"
