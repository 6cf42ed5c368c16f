import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from objectives.base import Draw
from vlp.data import decode, transforms
from vlp.data.decode import decode_image, rgb_tensor
from vlp.data.records import BadSample
from vlp.data.transforms import (
    EvalTransform,
    ImageTransformConfig,
    TrainTransform,
    may_flip,
)

RAMP = np.linspace(0, 65535, 12, dtype=np.uint16).reshape(3, 4)
EIGHT_BITS = np.round(RAMP / 257).astype(np.uint8)


def encode(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def picture(height=40, width=60, seed=0):
    """A smooth colour image, uint8 [H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def hwc(tensor):
    assert tensor.dtype == torch.uint8 and tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("format, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})])
def test_lossless_rgb(format, options):
    pixels = picture()
    assert np.array_equal(hwc(decode_image(encode(Image.fromarray(pixels), format, **options))), pixels)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_fast_decoder_agrees_with_pillow_on_jpeg(mode, monkeypatch):
    data = encode(Image.fromarray(picture()).convert(mode), "JPEG", quality=95)
    fast = hwc(decode_image(data)).astype(int)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(fast - reference).max() <= 2
    monkeypatch.setattr(decode, "torchvision_decode", None)
    assert np.array_equal(hwc(decode_image(data)), reference)


def test_grey_and_bilevel():
    grey = picture()[..., 0]
    for image in (Image.fromarray(grey), Image.fromarray(grey).convert("P")):
        assert np.array_equal(hwc(decode_image(encode(image))), np.stack([grey] * 3, axis=-1))
    bits = Image.fromarray(grey > 100)
    assert bits.mode == "1"
    assert np.array_equal(hwc(decode_image(encode(bits)))[..., 1], (grey > 100) * np.uint8(255))


def test_palette():
    image = Image.fromarray(picture()).quantize(16)
    assert image.mode == "P"
    assert np.array_equal(hwc(decode_image(encode(image))), np.asarray(image.convert("RGB")))
    assert np.array_equal(hwc(decode_image(encode(image, "GIF"))), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("format, options", [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})])
def test_alpha_is_put_on_white(format, options):
    pixels = np.zeros((2, 3, 4), dtype=np.uint8)
    pixels[..., 0] = 200
    pixels[..., 3] = [[0, 255, 51], [255, 0, 51]]
    decoded = hwc(decode_image(encode(Image.fromarray(pixels), format, **options)))
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[0, 1].tolist() == [200, 0, 0]
    assert decoded[0, 2].tolist() == [244, 204, 204]  # a fifth of (200, 0, 0) on white


def test_grey_alpha_and_transparent_palette():
    grey = np.zeros((2, 2, 2), dtype=np.uint8)
    grey[..., 1] = [[0, 255], [255, 0]]
    decoded = hwc(decode_image(encode(Image.fromarray(grey, "LA"))))
    assert decoded[..., 0].tolist() == [[255, 0], [0, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    decoded = hwc(decode_image(encode(palette, transparency=0)))
    assert decoded.tolist() == [[[255, 255, 255], [40, 50, 60]]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    decoded = hwc(decode_image(encode(keyed, transparency=(1, 2, 3))))
    assert decoded.tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_cmyk():
    image = Image.fromarray(picture()).convert("CMYK")
    for format in ("JPEG", "TIFF"):
        data = encode(image, format)
        reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(hwc(decode_image(data)), reference)
        assert np.abs(reference.astype(int) - picture()).mean() < 10


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    decoded = hwc(decode_image(encode(Image.fromarray(RAMP), format)))
    for channel in range(3):
        assert np.array_equal(decoded[..., channel], EIGHT_BITS)


def test_16_bit_big_endian_and_mode_i():
    big = Image.frombytes("I;16B", (4, 3), RAMP.astype(">u2").tobytes())
    assert np.array_equal(hwc(rgb_tensor(big))[..., 0], EIGHT_BITS)
    wide = Image.fromarray(RAMP.astype(np.int32))
    assert wide.mode == "I"
    assert np.array_equal(hwc(rgb_tensor(wide))[..., 0], EIGHT_BITS)
    assert np.array_equal(hwc(decode_image(encode(wide, "TIFF")))[..., 0], EIGHT_BITS)


def test_16_bit_colour_png():
    import struct
    import zlib

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    pixels = np.stack([RAMP, RAMP[::-1], 65535 - RAMP], axis=-1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.abs(hwc(decode_image(data)).astype(float) - pixels / 257).max() <= 1


def test_pixels_without_known_range_are_bad():
    for pixels in (np.full((2, 2), 0.5, dtype=np.float32), np.full((2, 2), 70000, dtype=np.int32)):
        with pytest.raises(BadSample, match=r"k7: broken image: .*no known range"):
            decode_image(encode(Image.fromarray(pixels), "TIFF"), "k7")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(format):
    pixels = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    options = {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    decoded = hwc(decode_image(encode(Image.fromarray(pixels), format, exif=exif, **options)))
    assert decoded.shape == (60, 40, 3)
    assert np.abs(decoded.astype(int) - np.rot90(pixels, -1)).max() <= 6


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_and_foreign_data_are_bad(format):
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    assert decode_image(data).shape == (3, 50, 50)
    for length in (len(data) // 2, 40, 3, 0):
        with pytest.raises(BadSample) as caught:
            decode_image(data[:length], "k1")
        assert caught.value.key == "k1" and "image" in caught.value.reason
    with pytest.raises(BadSample, match="not an image"):
        decode_image(b"<html>404</html>", "k1")


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for format, options in (("WEBP", {"lossless": True}), ("GIF", {})):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert hwc(decode_image(data))[0, 0].tolist() == [255, 0, 0]


def image_of(height=40, width=60):
    return torch.from_numpy(picture(height, width).copy()).permute(2, 0, 1).contiguous()


def test_resize_modes():
    image = image_of()
    squash = EvalTransform(ImageTransformConfig(image_size=32))(image)
    pillow = np.asarray(Image.fromarray(picture()).resize((32, 32), Image.Resampling.BICUBIC))
    assert np.abs(hwc(squash).astype(int) - pillow).max() <= 1
    shortest = EvalTransform(ImageTransformConfig(image_size=20, resize="shortest"))(image)
    assert torch.equal(shortest, F.resize(image, [20, 30], transforms._mode(ImageTransformConfig()))[..., 5:25])
    longest = EvalTransform(ImageTransformConfig(image_size=30, resize="longest", fill=7))(image)
    assert longest.shape == (3, 30, 30)
    assert (longest[:, :5] == 7).all() and (longest[:, 25:] == 7).all()
    assert torch.equal(longest[:, 5:25], F.resize(image, [20, 30], transforms._mode(ImageTransformConfig())))
    assert EvalTransform(ImageTransformConfig(image_size=8, resize="longest"))(image_of(1, 300)).shape == (3, 8, 8)


STRONG = ImageTransformConfig(
    image_size=24, crop_scale=(0.3, 1.0), rotation=20.0, color_jitter=0.4, randaugment_n=2, randaugment_m=9
)


def test_training_view_is_a_function_of_the_key():
    train, image = TrainTransform(STRONG), image_of()
    views = [train(image, Draw(0).sample("image", p), ["a dog"]) for p in range(20)]
    for p in reversed(range(20)):
        torch.manual_seed(p)  # the global generator plays no part
        assert torch.equal(train(image, Draw(0).sample("image", p), ["a dog"]), views[p])
    assert all(view.shape == (3, 24, 24) and view.dtype == torch.uint8 for view in views)
    assert len({view.numpy().tobytes() for view in views}) == 20


def test_flip_is_off_for_left_and_right():
    image = image_of(24, 24)
    train = TrainTransform(ImageTransformConfig(image_size=24))
    plain = [train(image, Draw(0).sample("image", p), ["a dog"]) for p in range(100)]
    flipped = [torch.equal(view, image.flip(-1)) for view in plain]
    assert 30 < sum(flipped) < 70
    assert all(f or torch.equal(view, image) for f, view in zip(flipped, plain))
    for texts in (["a dog", "Left arrow"], ["on the right-hand side"], ["leftmost cup"], ["rightwards arrow"]):
        assert all(torch.equal(train(image, Draw(0).sample("image", p), texts), image) for p in range(20))
    assert may_flip(train.config, ["a bright copyright", "gleft over"])
    assert may_flip(ImageTransformConfig(flip="always"), ["left"])
    assert not may_flip(ImageTransformConfig(flip="never"), ["a dog"])


def test_text_changes_the_flip_only():
    config = STRONG.model_copy(update={"rotation": 0.0, "randaugment_n": 0})
    train, image = TrainTransform(config), image_of()
    pairs = [[train(image, Draw(0).sample("i", p), [text]) for text in ("dog", "left")] for p in range(20)]
    same = [torch.equal(a, b) for a, b in pairs]
    assert 4 < sum(same) < 16
    assert all(s or (a.flip(-1).int() - b.int()).abs().max() <= 2 for s, (a, b) in zip(same, pairs))


def test_crops_cover_the_asked_share():
    side = 100
    ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = torch.stack([ys, xs, ys]).to(torch.uint8)
    train = TrainTransform(ImageTransformConfig(image_size=16, crop_scale=(0.25, 0.5), flip="never"))
    shares = []
    for p in range(50):
        view = train(image, Draw(0).sample("i", p)).float()
        # Outer pixels are centres of cells of size span / 15.
        height, width = ((view[c].max() - view[c].min()).item() * 16 / 15 for c in (0, 1))
        shares.append(height * width / side**2)
        assert 0.7 < width / height < 1.45
    assert 0.2 < min(shares) < 0.3 and 0.43 < max(shares) < 0.55


def test_crop_of_a_very_long_image():
    train = TrainTransform(ImageTransformConfig(image_size=16, crop_scale=(0.9, 1.0)))
    assert train(image_of(10, 200), Draw(0).sample("i", 0)).shape == (3, 16, 16)


@pytest.mark.parametrize("name", transforms._RANDAUGMENT)
def test_each_randaugment_operation(name, monkeypatch):
    monkeypatch.setattr(transforms, "_RANDAUGMENT", [name])
    config = ImageTransformConfig(image_size=24, flip="never", randaugment_n=1, randaugment_m=15)
    image = EvalTransform(config)(image_of())
    view = TrainTransform(config)(image_of(), Draw(0).sample("i", 0))
    assert view.shape == (3, 24, 24) and view.dtype == torch.uint8
    assert torch.equal(view, image) == (name == "identity")


def test_rotation_uncovers_the_fill():
    config = ImageTransformConfig(image_size=24, flip="never", rotation=45.0, fill=9)
    views = [TrainTransform(config)(image_of(), Draw(0).sample("i", p)) for p in range(5)]
    assert any((view[:, 0, 0] == 9).all() for view in views)


def test_zoom_and_shift_move_a_square_by_what_they_say():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image[:, 10:30, 10:30] = 255
    config = ImageTransformConfig(image_size=40, flip="never", fill=0, zoom=(0.5, 2.0), shift=0.25)
    sides, centres = [], []
    for position in range(60):
        rows = (TrainTransform(config)(image, Draw(0).sample("i", position))[0] > 127).any(1).nonzero()[:, 0]
        if rows[0] > 0 and rows[-1] < 39:  # all of it is in sight
            sides.append(len(rows))
            centres.append((rows[0] + rows[-1]).item() / 2 - 19.5)
    assert 9 <= min(sides) < 15 and 28 < max(sides) <= 41
    assert -10.5 <= min(centres) < -5 and 5 < max(centres) <= 10.5
    still = ImageTransformConfig(image_size=40, flip="never", zoom=(2.0, 2.0))
    assert (TrainTransform(still)(image, Draw(0).sample("i", 0)) == 255).float().mean() > 0.9


@pytest.mark.parametrize(
    "wrong",
    [
        {"zoom": (0.0, 1.0)},
        {"zoom": (2.0, 1.0)},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5, 0.2)},
        {"image_size": 0},
    ],
)
def test_config_is_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImageTransformConfig(**wrong)
