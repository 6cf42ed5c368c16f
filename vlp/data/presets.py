"""How the published models prepare their images: a transform, and the mean and std that the encoder normalises with.

Pillow resamples in all of them, as in the authors' own evaluation. A checkpoint's loader puts ``transform`` into
``data.transform`` and ``mean`` and ``std`` into ``model.vision``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from vlp.data.transforms import EvalTransform, ImageTransformConfig

Channels: TypeAlias = tuple[float, float, float]

CLIP_MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Channels = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
HALF: Channels = (0.5, 0.5, 0.5)

_PROCESSORS = (
    "BlipImageProcessor",
    "BridgeTowerImageProcessor",
    "CLIPImageProcessor",
    "ChineseCLIPImageProcessor",
    "DeiTImageProcessor",
    "EfficientNetImageProcessor",
    "FlavaImageProcessor",
    "Siglip2ImageProcessor",
    "SiglipImageProcessor",
    "ViTImageProcessor",
    "ViltImageProcessor",
)
"""Of transformers, those that do nothing but what ``hf_processor`` reads."""


class Preset(NamedTuple):
    """A model's image preprocessing."""

    transform: ImageTransformConfig
    """Size and look, as uint8."""
    mean: Channels
    """Channel means of pixels in 0..1."""
    std: Channels
    """Channel standard deviations of pixels in 0..1."""

    def pixels(self, image: Tensor) -> Tensor:
        """What the model itself gets: uint8 [3, h, w] -> normalised float32 [3, H, W]."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (EvalTransform(self.transform)(image).float() / 255 - mean) / std


def _preset(size: int, mean: Channels, std: Channels, **fields: Any) -> Preset:
    return Preset(ImageTransformConfig(image_size=size, resampler="pillow", **fields), mean, std)


def albef_blip(size: int = 384) -> Preset:
    """ALBEF, BLIP and X-VLM: squashed to a square, CLIP's mean and std."""
    return _preset(size, CLIP_MEAN, CLIP_STD)


def beit3(size: int = 224) -> Preset:
    """BEiT-3 and VLMo: squashed to a square, mean and std 0.5."""
    return _preset(size, HALF, HALF)


def vilt(size: int = 384) -> Preset:
    """ViLT: shorter side ``size``, aspect ratio kept, both sides multiples of 32; images differ in size."""
    return _preset(size, HALF, HALF, resize="shortest", multiple=32, crop="none")


def naflex(patch_size: int = 16, max_patches: int = 256) -> Preset:
    """SigLIP 2 NaFlex: as many patches as fit into the number, aspect ratio kept, mean and std 0.5."""
    side = patch_size * math.isqrt(max_patches)
    own = {"multiple": patch_size, "max_patches": max_patches, "interpolation": "bilinear"}
    return _preset(side, HALF, HALF, resize="shortest", crop="none", **own)


def meter_clip(size: int = 288) -> Preset:
    """METER with CLIP's tower, and OpenAI's CLIP: shorter side and central crop."""
    return _preset(size, CLIP_MEAN, CLIP_STD, resize="shortest")


def meter_imagenet(size: int = 384) -> Preset:
    """METER with Swin: shorter side and central crop, ImageNet's mean and std."""
    return _preset(size, IMAGENET_MEAN, IMAGENET_STD, resize="shortest")


def timm_model(config: Mapping[str, Any]) -> Preset:
    """A timm model by its ``pretrained_cfg``, as timm evaluates it.

    Raises:
        ValueError: A setting is not known here.
    """
    name = "timm pretrained_cfg"
    size = _square(config.get("input_size", (3, 224, 224))[-2:], name, "input_size")
    mode = _one_of(config.get("crop_mode") or "center", {"center": "shortest", "squash": "squash"}, name, "crop_mode")
    return _preset(
        size,
        _channels(config.get("mean", IMAGENET_MEAN)),
        _channels(config.get("std", IMAGENET_STD)),
        resize=mode,
        interpolation=_interpolation(config.get("interpolation", "bicubic"), name),
        # timm rounds the side that it scales to down, so the share is not quite its crop_pct.
        crop_share=size / int(size / (config.get("crop_pct") or 0.875)),
    )


def openclip(config: Mapping[str, Any]) -> Preset:
    """An open_clip model by the ``preprocess_cfg`` of its ``open_clip_config.json``; what it leaves out is open_clip's.

    Raises:
        ValueError: A setting is not known here.
    """
    name = "open_clip preprocess_cfg"
    modes = {mode: mode for mode in ("shortest", "longest", "squash")}
    return _preset(
        _square(config.get("size", 224), name, "size"),
        _channels(config.get("mean") or CLIP_MEAN),
        _channels(config.get("std") or CLIP_STD),
        resize=_one_of(config.get("resize_mode") or "shortest", modes, name, "resize_mode"),
        interpolation=_interpolation(config.get("interpolation") or "bicubic", name),
        fill=config.get("fill_color", 0),
    )


def hf_processor(config: Mapping[str, Any]) -> Preset:
    """A model of transformers by its ``preprocessor_config.json``, of any version; what it leaves out is its class's.

    Gives what the class's Pillow backend gives, which is what the checkpoints' authors used.

    Raises:
        ValueError: The class, or a setting, is not known here.
    """
    processor = _processor(config)
    name = type(processor).__name__
    given = {key: getattr(processor, key, None) for key in ("do_resize", "do_center_crop", "size_divisor")}
    if not given["do_resize"]:
        raise ValueError(f"preprocessor_config.json: {name} with do_resize false takes images as they are; set it true")
    if hasattr(processor, "max_num_patches"):
        found = naflex(processor.patch_size, processor.max_num_patches)
        look = found.transform.model_copy(update={"interpolation": _resample(processor.resample)})
        return Preset(look, *_statistics(processor))
    size, crop = (dict(getattr(processor, key, None) or {}) for key in ("size", "crop_size"))
    sides = {key: value for key, value in size.items() if value is not None}
    fields: dict[str, Any] = {"interpolation": _resample(processor.resample), "resize": "squash", "crop": "floor"}
    if set(sides) == {"shortest_edge"}:
        scaled = sides["shortest_edge"]
        fields |= {"resize": "shortest", "multiple": given["size_divisor"]}
    elif set(sides) == {"height", "width"}:
        scaled = _square((sides["height"], sides["width"]), name, "size")
    else:
        raise ValueError(f"preprocessor_config.json: {name} size {sides} should be shortest_edge, or height and width")
    if given["do_center_crop"]:
        edges = [crop[key] for key in ("height", "width", "shortest_edge") if crop.get(key) is not None]
        side = _square((edges[0], edges[-1]), name, "crop_size")
    elif fields["resize"] == "shortest" and fields["multiple"] is None:
        raise ValueError(f"preprocessor_config.json: {name} keeps the aspect ratio; set do_center_crop true")
    else:
        side, fields["crop"] = scaled, "none" if fields["resize"] == "shortest" else "floor"
    if side > scaled:
        raise ValueError(f"preprocessor_config.json: {name} crop_size {side} is more than size {scaled}; lower it")
    return _preset(side, *_statistics(processor), crop_share=side / scaled, **fields)


def _processor(config: Mapping[str, Any]) -> Any:
    """The image processor of transformers: it knows its defaults and the older forms of its settings."""
    import transformers

    name = config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIPImageProcessor"
    name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if name not in _PROCESSORS:
        raise ValueError(
            f"preprocessor_config.json: image_processor_type {name} is not known; known are {', '.join(_PROCESSORS)}"
        )
    # A config may name code of its own (auto_map): nothing of it is looked at.
    settings = {key: value for key, value in config.items() if not key.endswith("_type") and key != "auto_map"}
    try:
        return getattr(transformers, name)(**settings)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"preprocessor_config.json: {name} refuses it: {error}") from error


def _statistics(processor: Any) -> tuple[Channels, Channels]:
    """Mean and std for pixels in 0..1 of (pixel * factor - offset - mean) / std."""
    factor = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
    offset = 1.0 if processor.do_rescale and getattr(processor, "rescale_offset", False) else 0.0
    mean, std = [0.0] * 3, [1.0] * 3
    if processor.do_normalize:
        mean, std = list(_channels(processor.image_mean)), list(_channels(processor.image_std))
    mean = [(offset + value) / factor for value in mean]
    if getattr(processor, "include_top", False):  # EfficientNet with its classifier: divided once more
        std = [value * extra for value, extra in zip(std, _channels(processor.image_std))]
    return _channels(mean), _channels([value / factor for value in std])


def _resample(number: Any) -> str:
    """Name of one of Pillow's numbers."""
    return Image.Resampling(int(number)).name.lower()


def _interpolation(name: str, where: str) -> str:
    # `random` is for training; both libraries evaluate with bicubic then.
    known = {each: each for each in ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")}
    return _one_of(name, {**known, "random": "bicubic"}, where, "interpolation")


def _one_of(value: str, known: Mapping[str, str], where: str, field: str) -> str:
    if value not in known:
        raise ValueError(f"{where}: {field} {value!r} is not known; known are {', '.join(known)}")
    return known[value]


def _square(size: int | Sequence[int], where: str, field: str) -> int:
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    if height != width:
        raise ValueError(f"{where}: {field} {height} x {width} is no square, which encoders here want")
    return int(height)


def _channels(values: float | Sequence[float]) -> Channels:
    one = [float(values)] * 3 if isinstance(values, int | float) else [float(value) for value in values]
    red, green, blue = one * 3 if len(one) == 1 else one
    return red, green, blue
