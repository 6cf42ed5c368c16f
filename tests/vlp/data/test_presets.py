import numpy as np
import open_clip
import pytest
import timm.data
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from vlp.config import build, to_yaml
from vlp.data import presets
from vlp.data.presets import CLIP_MEAN, CLIP_STD, hf_processor, openclip
from vlp.data.transforms import ImageTransformConfig, TrainTransform, pad_images

SIZES = [(60, 88), (90, 52), (33, 33), (7, 61), (400, 301), (31, 32)]


def picture(height, width):
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)


def hf(kind, **settings):
    return hf_processor({"image_processor_type": kind, **settings})


HF_CLIP = hf("CLIPImageProcessor", size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
HALVES = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resize_mode": "squash", "interpolation": "bilinear", **HALVES},
        {"resize_mode": "longest", "fill_color": 90},
        {"interpolation": "random", "resize_mode": None},
    ],
)
def test_openclip_is_open_clips(settings, size):
    theirs = image_transform_v2(PreprocessCfg(size=24, **settings), is_train=False)
    image, pixels = picture(*size)
    torch.testing.assert_close(openclip({"size": 24, **settings}).pixels(pixels), theirs(image))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "kind, settings",
    [
        ("CLIP", {"size": 24, "crop_size": 24}),  # the old form
        ("CLIP", {"size": {"shortest_edge": 30}, "crop_size": 24, "resample": 1}),
        ("ChineseCLIP", {"size": {"height": 24, "width": 24}, "crop_size": 24, "do_center_crop": False}),
        ("ViT", {"size": {"height": 24, "width": 24}, "do_normalize": False}),
        ("DeiT", {"size": {"height": 27, "width": 27}, "crop_size": {"height": 24, "width": 24}}),
        ("Siglip", {"size": {"height": 24, "width": 24}, "do_rescale": False}),
        ("Vilt", {"size": 48, "size_divisor": 8}),
        ("BridgeTower", {"size": {"shortest_edge": 32}, "crop_size": {"shortest_edge": 30}, "size_divisor": 10}),
        (
            "EfficientNet",
            {
                "size": {"height": 30, "width": 30},
                "crop_size": {"height": 24, "width": 24},
                "do_center_crop": True,
                "rescale_factor": 1 / 127.5,
                "rescale_offset": True,
                "include_top": False,
                "do_normalize": False,
            },
        ),
        ("EfficientNet", {"size": {"height": 30, "width": 30}, "include_top": True}),
    ],
)
def test_hf_processor_is_transformers(kind, settings, size):
    if kind in ("Vilt", "BridgeTower") and min(size) < 16:
        return  # what the reference leaves of it is empty
    theirs = getattr(transformers, f"{kind}ImageProcessorPil")(**settings)
    image, pixels = picture(*size)
    wanted = torch.as_tensor(theirs(image, return_tensors="pt").pixel_values[0])
    ours = hf(f"{kind}ImageProcessor", **settings).pixels(pixels)
    torch.testing.assert_close(ours, wanted.float(), atol=2e-5 if theirs.do_rescale else 1e-3, rtol=1e-5)


@pytest.mark.parametrize("cfg", [{}, {"crop_pct": 0.9, "interpolation": "bilinear"}, {"crop_mode": "squash"}])
@pytest.mark.parametrize("size", SIZES)
def test_timm_model_is_timms(cfg, size):
    cfg = {"input_size": (3, 28, 28), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 0.875, **cfg}
    data = timm.data.resolve_data_config(pretrained_cfg=cfg)
    theirs = timm.data.create_transform(**data, is_training=False)
    image, pixels = picture(*size)
    torch.testing.assert_close(presets.timm_model(cfg).pixels(pixels), theirs(image))


def test_classes_of_old_files_are_found():
    old = hf_processor({"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "resample": 3})
    assert old == HF_CLIP and old.transform.crop == "floor"
    assert hf("CLIPImageProcessorFast", size=32, crop_size=32) == HF_CLIP
    # Without a name it is CLIP's, as files of the first versions are.
    assert hf_processor({"size": 32, "crop_size": 32}) == HF_CLIP
    default = hf_processor({"image_processor_type": "ViltImageProcessor"})
    assert default == presets.vilt(384)._replace(transform=default.transform) and default.transform.multiple == 32


def test_mean_and_std_stand_beside_the_transform():
    preset = presets.albef_blip(384)
    assert (preset.mean, preset.std) == (CLIP_MEAN, CLIP_STD)
    assert preset.mean == open_clip.OPENAI_DATASET_MEAN and preset.std == open_clip.OPENAI_DATASET_STD
    assert openclip({}).transform.image_size == 224 and openclip({"mean": 0.5}).mean == (0.5, 0.5, 0.5)
    tree = preset.transform.model_dump(exclude_defaults=True)
    assert tree == {"image_size": 384, "resampler": "pillow"}
    assert build(ImageTransformConfig, tree) == preset.transform
    assert "resampler: pillow" in to_yaml(preset.transform)


def test_images_of_different_sizes_are_padded():
    transform = presets.EvalTransform(presets.vilt(64).transform)
    images = [transform(picture(*size)[1]) for size in ((60, 88), (90, 52), (64, 64))]
    assert [tuple(image.shape[1:]) for image in images] == [(64, 64), (96, 32), (64, 64)]
    batch = pad_images(images, patch_size=32)
    assert batch.pixels.shape == (3, 3, 96, 64) and batch.pixels.dtype == torch.uint8
    assert batch.keep.tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0]]
    for image, padded in zip(images, batch.pixels):
        assert torch.equal(padded[:, : image.shape[1], : image.shape[2]], image)
        assert padded.sum() == image.sum()
    assert pad_images(images[::2], 32).keep is None
    with pytest.raises(AssertionError, match="no whole patches"):
        pad_images(images, 48)


def test_padding_is_that_of_transformers():
    theirs = transformers.ViltImageProcessorPil(size={"shortest_edge": 64}, size_divisor=32)
    preset = presets.vilt(64)
    images, tensors = zip(*(picture(*size) for size in ((60, 88), (90, 52), (200, 64))))
    wanted = theirs(list(images), return_tensors="pt")
    batch = pad_images([presets.EvalTransform(preset.transform)(image) for image in tensors], 32)
    patches = wanted.pixel_mask[:, ::32, ::32].flatten(1).bool()
    assert batch.pixels.shape == wanted.pixel_values.shape and torch.equal(batch.keep, patches)


def test_training_sees_the_same_image_as_evaluation():
    preset = presets.vilt(64)
    config = preset.transform.model_copy(update={"flip": "never"})
    image = picture(60, 88)[1]
    train = TrainTransform(config)(image, np.random.default_rng(0))
    assert torch.equal(train, presets.EvalTransform(config)(image))
    crops = config.model_copy(update={"crop_scale": (0.5, 1.0)})
    assert TrainTransform(crops)(image, np.random.default_rng(0)).shape == (3, 64, 64)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: openclip({"size": [224, 336]}), "size 224 x 336 is no square"),
        (lambda: openclip({"resize_mode": "stretch"}), "resize_mode 'stretch' is not known; known are shortest"),
        (lambda: openclip({"interpolation": "cubic"}), "interpolation 'cubic' is not known"),
        (lambda: presets.timm_model({"crop_mode": "border"}), "crop_mode 'border' is not known"),
        (lambda: hf("LevitImageProcessor"), "image_processor_type LevitImageProcessor is not known"),
        (lambda: hf("Trainer"), "image_processor_type Trainer is not known"),
        (lambda: hf("CLIPImageProcessor", do_resize=False), "do_resize false"),
        (lambda: hf("CLIPImageProcessor", do_center_crop=False), "set do_center_crop true"),
        (lambda: hf("CLIPImageProcessor", size={"shortest_edge": 32, "longest_edge": 64}), "should be shortest_edge"),
        (lambda: hf("CLIPImageProcessor", size={"shortest_edge": 32}, crop_size=64), "crop_size 64 is more than"),
        (lambda: ImageTransformConfig(interpolation="lanczos"), "torch has no interpolation lanczos"),
        (lambda: ImageTransformConfig(resampler="pillow", antialias=False), "pillow always antialiases"),
    ],
)
def test_what_is_not_known_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
