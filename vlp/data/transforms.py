"""Pixels to the size and look that training or evaluation wants.

Everything stays uint8 [3, H, W] (RGB); the encoder normalises. Random choices come from a NumPy generator that the
caller keys by the sample's position, so that an augmented image is a pure function of that position.
How the published models prepare their images stands in ``vlp.data.presets``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from encoders.types import Images
from vlp.config import Config

_LONGEST = 1333 / 800  # of the shorter side; Faster R-CNN's bound, which Pixel-BERT and ViLT keep
_SIDES = re.compile(r"\b(left|right)([ -]?(hand(ed)?|most|wards?|side))?\b", re.IGNORECASE)


class ImageTransformConfig(Config):
    """Size of the images, and how training varies them. Augmentation is off unless set, flips excepted."""

    image_size: int | None = Field(default=None, ge=1)
    """Side of the square image that the encoder gets, in pixels; none = the vision encoder's."""
    resize: Literal["squash", "shortest", "longest"] = "squash"
    """Squash ignores the aspect ratio; shortest scales the shorter side and cuts the centre; longest scales the longer
    side and pads."""
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest", "box", "hamming"] = "bicubic"
    """Interpolation of every resize; torch knows the first two."""
    antialias: bool = True
    """Blur before shrinking; Pillow always does."""
    resampler: Literal["torch", "pillow"] = "torch"
    """Pillow is what published models were evaluated with; torch is faster and rounds some pixels to the next level."""
    crop: Literal["round", "floor", "none"] = "round"
    """How the corner of the central crop is rounded: as torchvision or as transformers does it; none = no crop, which
    with resize shortest gives images of different sizes."""
    crop_share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Side of the central crop over the side that images are scaled to before it; less than 1 cuts the border off."""
    multiple: int | None = Field(default=None, ge=1)
    """shortest: hold the longer side to 1333/800 of image_size, and round both sides down to multiples of this."""
    max_patches: int | None = Field(default=None, ge=1)
    """shortest with `multiple`, the side of a patch: scale to as many whole patches as there are up to this number, the
    aspect ratio kept as far as they allow; image_size is not asked (NaFlex, SigLIP 2: 256)."""
    fill: int = Field(default=255, ge=0, le=255)
    """Grey level of pixels that padding, rotation or shearing uncovers."""
    crop_scale: tuple[float, float] | None = None
    """Training: a random crop of this share of the area, (smallest, largest), is squashed to size; off if none."""
    flip: Literal["auto", "never", "always"] = "auto"
    """Training: mirror half of the images. auto leaves those alone whose text says left or right."""
    rotation: float = Field(default=0.0, ge=0.0, le=180.0)
    """Training: rotate by up to this many degrees either way."""
    zoom: tuple[float, float] | None = None
    """Training: scale about the centre by a factor in (smallest, largest); `fill` shows around a smaller image."""
    shift: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Training: move by up to this share of the side, along both axes."""
    color_jitter: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Training: change brightness, contrast and saturation by factors in 1 - x .. 1 + x. Hue stays: texts name it."""
    randaugment_n: int = Field(default=0, ge=0)
    """Training: RandAugment operations per image (without invert and cutout), 0 = off."""
    randaugment_m: int = Field(default=9, ge=0, le=30)
    """Training: strength of RandAugment, 0 to 30."""

    @property
    def side(self) -> int:
        """The image size, once it is known."""
        assert self.image_size is not None, "settle(run) takes it from the vision encoder"
        return self.image_size

    @field_validator("resampler")
    @classmethod
    def _check_resampler(cls, value: str, info: ValidationInfo) -> str:
        interpolation, antialias = info.data.get("interpolation"), info.data.get("antialias")
        if value == "torch" and interpolation not in (None, "bicubic", "bilinear"):
            raise ValueError(f"torch has no interpolation {interpolation}; use pillow, or bicubic or bilinear")
        if value == "pillow" and antialias is False:
            raise ValueError("pillow always antialiases; set antialias true, or use torch")
        return value

    @field_validator("crop_scale", "zoom")
    @classmethod
    def _check_range(cls, value: tuple[float, float] | None, info: ValidationInfo) -> tuple[float, float] | None:
        crop = info.field_name == "crop_scale"
        if value is not None and not 0.0 < value[0] <= value[1] <= (1.0 if crop else np.inf):
            what = (
                "shares of the area with 0 < smallest <= largest <= 1" if crop else "factors, 0 < smallest <= largest"
            )
            raise ValueError(f"{value} must be two {what}")
        return value


STILL: dict[str, Any] = {
    "resize": "squash",
    "crop_scale": None,
    "flip": "never",
    "rotation": 0.0,
    "zoom": None,
    "shift": 0.0,
    "randaugment_n": 0,
}
"""Settings of the transform under which a box's place in the image stays its share of the sides."""


def moved_by(config: ImageTransformConfig) -> list[str]:
    """Return the settings under which boxes would not follow their image."""
    return [name for name, still in STILL.items() if getattr(config, name) != still]


class EvalTransform:
    """Resize only: uint8 [3, H, W] to uint8 [3, image_size, image_size], or other sizes where nothing is cropped."""

    def __init__(self, config: ImageTransformConfig):
        self.config = config

    def __call__(self, image: Tensor) -> Tensor:
        """Resize ``image``, uint8 [3, H, W]."""
        return resize(image, self.config)


class TrainTransform:
    """Resize and augment: uint8 [3, H, W] to uint8 [3, image_size, image_size]."""

    def __init__(self, config: ImageTransformConfig):
        self.config = config

    def __call__(self, image: Tensor, generator: np.random.Generator, texts: Sequence[str] = ()) -> Tensor:
        """Augment one image.

        Args:
            image: uint8 [3, H, W].
            generator: Source of all choices, see ``objectives.base.Draw.sample``.
            texts: Texts of the sample, which decide whether it may be mirrored.
        """
        config = self.config
        if config.crop_scale is None:
            image = resize(image, config)
        else:
            image = _random_crop(image, config, config.crop_scale, generator)
        # Drawn even if unused, so that one text does not change the other choices.
        if generator.random() < 0.5 and may_flip(config, texts):
            image = F.horizontal_flip(image)
        if config.rotation or config.zoom or config.shift:
            image = _move(image, config, generator)
        if config.color_jitter:
            image = _jitter(image, config.color_jitter, generator)
        for _ in range(config.randaugment_n):
            image = _randaugment(image, config, generator)
        return image


def may_flip(config: ImageTransformConfig, texts: Sequence[str]) -> bool:
    """Whether a sample with these texts may be mirrored."""
    return config.flip == "always" or (config.flip == "auto" and not any(_SIDES.search(text) for text in texts))


def _mode(config: ImageTransformConfig) -> InterpolationMode:
    return InterpolationMode(config.interpolation)


def resize(image: Tensor, config: ImageTransformConfig) -> Tensor:
    """Bring uint8 [3, H, W] to [3, image_size, image_size] by ``config.resize``.

    Where ``config.crop`` is none, ``shortest`` gives [3, h, w] with the image's own aspect ratio.
    """
    height, width = image.shape[-2:]
    if config.resize == "longest":
        return _letterbox(image, config)
    side = round(config.side / config.crop_share)
    if config.resize == "squash":
        size = [side, side]
    elif config.multiple is not None and config.max_patches is not None:
        size = _patched_size(height, width, config.multiple, config.max_patches)
    elif config.multiple is not None:
        size = _bounded_size(height, width, side, config.multiple)
    else:
        size = [side * height // width, side] if width <= height else [side, side * width // height]
    scaled = _scale(image, size, config)
    return scaled if config.crop == "none" else _center_crop(scaled, config.side, config.crop)


def pad_images(images: Sequence[Tensor], patch_size: int) -> Images:
    """Stack images of one or several sizes.

    Args:
        images: uint8 [3, h, w] each, h and w multiples of ``patch_size``.
        patch_size: Side of the encoder's patches in pixels.

    Returns:
        pixels [B, 3, H, W] of the largest height and width, smaller images at the top left; keep [B, P], row by row of
        the H / patch_size x W / patch_size grid, True where a patch is image, or None if all images have one size.
    """
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    if all(image.shape[1:] == (height, width) for image in images):
        return Images(torch.stack([image.contiguous() for image in images]))
    pixels = torch.zeros(len(images), 3, height, width, dtype=images[0].dtype)
    keep = torch.zeros(len(images), height // patch_size, width // patch_size, dtype=torch.bool)
    for row, image in enumerate(images):
        _, h, w = image.shape
        assert h % patch_size == w % patch_size == 0, f"{h} x {w} pixels are no whole patches of side {patch_size}"
        pixels[row, :, :h, :w] = image
        keep[row, : h // patch_size, : w // patch_size] = True
    return Images(pixels, keep.flatten(1))


def _scale(image: Tensor, size: list[int], config: ImageTransformConfig) -> Tensor:
    """Resample [3, H, W] to [3, *size]."""
    if config.resampler == "torch":
        return F.resize(image, size, _mode(config), antialias=config.antialias)
    source = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    scaled = source.resize((size[1], size[0]), Image.Resampling[config.interpolation.upper()])
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)


def _bounded_size(height: int, width: int, shorter: int, multiple: int) -> list[int]:
    """Size by Pixel-BERT's rule: shorter side, bound of the longer side, multiples."""
    scale = shorter / min(height, width)
    new = [shorter, scale * width] if height < width else [scale * height, shorter]
    longest = int(_LONGEST * shorter)
    if max(new) > longest:
        scale = longest / max(new)
        new = [scale * new[0], scale * new[1]]
    # At least one multiple: of a very long image the reference would leave nothing.
    return [max(multiple, int(side + 0.5) // multiple * multiple) for side in new]


def _patched_size(height: int, width: int, side: int, most: int) -> list[int]:
    """Size in whole patches of this side, at most ``most`` of them, found by halving as big_vision does it."""

    def sized(scale: float) -> list[int]:
        return [max(side, math.ceil(length * scale / side) * side) for length in (height, width)]

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        rows, columns = (length // side for length in sized(middle))
        low, high = (middle, high) if rows * columns <= most else (low, middle)
    return sized(low)


def _center_crop(image: Tensor, side: int, rounding: str) -> Tensor:
    """The central [3, side, side]; what is missing is black."""
    places = []
    for length in image.shape[-2:]:
        if rounding == "floor":
            places.append((length - side) // 2)
        else:
            places.append(round((length - side) / 2) if length >= side else -((side - length) // 2))
    return F.crop(image, places[0], places[1], side, side)


def _letterbox(image: Tensor, config: ImageTransformConfig) -> Tensor:
    """Scale the longer side to the image size and pad the shorter one, evenly."""
    side = config.side
    ratio = max(image.shape[-2:]) / side
    new = [max(1, round(length / ratio)) for length in image.shape[-2:]]
    top, left = (side - new[0]) // 2, (side - new[1]) // 2
    padding = [left, top, side - new[1] - left, side - new[0] - top]
    return F.pad(_scale(image, new, config), padding, fill=[float(config.fill)] * 3)


def _random_crop(
    image: Tensor, config: ImageTransformConfig, scale: tuple[float, float], generator: np.random.Generator
) -> Tensor:
    """A crop of random area and aspect ratio (3/4 to 4/3, as everywhere), squashed to size."""
    height, width = image.shape[-2:]
    for _ in range(10):  # as torchvision: give up after ten crops that stick out
        area = height * width * generator.uniform(*scale)
        ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        h, w = round(float(np.sqrt(area / ratio))), round(float(np.sqrt(area * ratio)))
        if 0 < h <= height and 0 < w <= width:
            top, left = int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1))
            break
    else:
        # An image longer than 4:3 gets the largest central crop of that shape.
        h, w = min(height, max(1, round(width * 4 / 3))), min(width, max(1, round(height * 4 / 3)))
        top, left = (height - h) // 2, (width - w) // 2
    return _scale(F.crop(image, top, left, h, w), [config.side] * 2, config)


def _move(image: Tensor, config: ImageTransformConfig, generator: np.random.Generator) -> Tensor:
    """Rotate, scale and shift in one resampling."""
    angle = float(generator.uniform(-config.rotation, config.rotation))
    scale = 1.0 if config.zoom is None else float(generator.uniform(*config.zoom))
    shift = [0.0, 0.0] if not config.shift else (generator.uniform(-1, 1, 2) * config.shift * config.side).tolist()
    fill = [float(config.fill)] * 3
    return F.affine(image, angle, shift, scale, [0.0, 0.0], InterpolationMode.BILINEAR, fill)


def _jitter(image: Tensor, strength: float, generator: np.random.Generator) -> Tensor:
    operations: list[Callable[[Tensor, float], Tensor]] = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    for i in generator.permutation(3):
        image = operations[i](image, float(generator.uniform(1 - strength, 1 + strength)))
    return image


_RANDAUGMENT = [
    "identity",
    "auto_contrast",
    "equalize",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
]


def _randaugment(image: Tensor, config: ImageTransformConfig, generator: np.random.Generator) -> Tensor:
    """One operation of RandAugment, with torchvision's ranges (m = 30 is the far end)."""
    name = _RANDAUGMENT[int(generator.integers(len(_RANDAUGMENT)))]
    strength = config.randaugment_m / 30  # 0 .. 1
    sign = 1 if generator.random() < 0.5 else -1
    factor = 1 + 0.9 * strength * sign
    side = config.side
    if name == "identity":
        return image
    if name == "auto_contrast":
        return F.autocontrast(image)
    if name == "equalize":
        return F.equalize(image)
    if name == "brightness":
        return F.adjust_brightness(image, factor)
    if name == "color":
        return F.adjust_saturation(image, factor)
    if name == "contrast":
        return F.adjust_contrast(image, factor)
    if name == "sharpness":
        return F.adjust_sharpness(image, factor)
    if name == "posterize":
        return F.posterize(image, 8 - round(4 * strength))
    if name == "solarize":
        return F.solarize(image, 255 * (1 - strength))
    angle, shear, shift = 0.0, [0.0, 0.0], [0, 0]
    if name == "rotate":
        angle = 30 * strength * sign
    elif name.startswith("shear"):
        shear[name == "shear_y"] = float(np.degrees(np.arctan(0.3 * strength * sign)))
    else:
        shift[name == "translate_y"] = round(150 / 331 * side * strength * sign)
    fill = [float(config.fill)] * 3
    return F.affine(image, angle, shift, 1.0, shear, InterpolationMode.BILINEAR, fill)
