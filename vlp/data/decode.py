"""Images, in memory, in files or encoded, to uint8 pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vlp.data.records import BadSample

try:
    # Deprecated since torchvision 0.29: the day it goes, Pillow decodes everything (JPEG then differs by rounding).
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_image as torchvision_decode
except ImportError:
    torchvision_decode = None

AnyImage: TypeAlias = Image.Image | str | Path
"""A Pillow image of any mode, or the path of an image file."""

_ORIENTATION = 0x0112  # EXIF tag


def read_image(image: AnyImage) -> Tensor:
    """A Pillow image, or the file at a path -> uint8 [3, H, W].

    Raises:
        ValueError: the file is missing, or is no whole image.
    """
    if isinstance(image, Image.Image):
        try:
            return rgb_tensor(image)
        except (OSError, ValueError, SyntaxError) as error:  # Pillow reads the pixels only now
            raise ValueError(f"image {getattr(image, 'filename', '') or repr(image)}: {error}") from error
    if not isinstance(image, str | Path):
        raise ValueError(f"images should be Pillow images or paths, not {type(image).__name__}")
    try:
        data = Path(image).read_bytes()
    except OSError as error:
        raise ValueError(f"image {image}: cannot be read ({error.strerror}); check the path") from error
    return decode_image(data, key=f"image {image}")


def decode_image(data: bytes, key: str = "image") -> Tensor:
    """Decode JPEG, PNG, WebP or any other format that Pillow knows.

    Grey and palette images become RGB, transparency is put on white, CMYK is converted, EXIF orientation is applied,
    16-bit values are scaled to 8 bits (not clipped), of an animation the first frame is taken.

    Args:
        data: The encoded image.
        key: Name of the sample, for the error.

    Returns:
        uint8 [3, H, W], channels last in memory, which resizing is fastest with.

    Raises:
        BadSample: If the data is no image, is truncated, or has a pixel format without a known range.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if _is_plain(image, data):
                try:
                    return torchvision_decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
                except RuntimeError:
                    pass  # odd or broken: Pillow decides which, below
            return rgb_tensor(image)
    except UnidentifiedImageError as error:
        raise BadSample(key, f"not an image that can be read ({len(data)} bytes)") from error
    # Pillow reports broken data as any of these, depending on the format.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise BadSample(key, f"broken image: {error}") from error


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether torchvision's decoder, about three times as fast as Pillow, gives the pixels we want."""
    return (
        torchvision_decode is not None
        and image.format in ("JPEG", "PNG", "WEBP")
        and image.mode in ("RGB", "L")
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
        and not (image.format == "PNG" and data[24] > 8)  # bits per channel, at its fixed place
        and image.getexif().get(_ORIENTATION, 1) == 1
    )


def rgb_tensor(image: Image.Image) -> Tensor:
    """A Pillow image of any mode as uint8 [3, H, W], by the rules of ``decode_image``.

    Raises:
        ValueError: If its mode has no known range (float, or integers above 16 bits).
    """
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray(_scale_16_bit(np.asarray(image)))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    pixels = np.array(image.convert("RGB"))  # [H, W, 3], copied: torch wants writable memory
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _scale_16_bit(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """0 .. 65535 to 0 .. 255, rounded. Pillow's own conversion clips at 255, which makes nearly all white."""
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("integer pixels above 16 bits have no known range")
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
