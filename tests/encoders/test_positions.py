import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from encoders.positions import resize_positions

GOLDENS = Path(__file__).parents[1] / "goldens"


def golden(name):
    folder = GOLDENS / name
    tolerance = json.loads((folder / "case.json").read_text())["tolerance"]
    return load_file(folder / "inputs.safetensors")["pos_embed"], load_file(folder / "outputs.safetensors"), tolerance


@pytest.mark.parametrize(
    "name, prefix", [("albef_posembed_resize", 1), ("beit3_posembed_resize", 3), ("meter_posembed_resize", 1)]
)
def test_bicubic_is_that_of_the_authors(name, prefix):
    table, wanted, tolerance = golden(name)
    torch.testing.assert_close(resize_positions(table, (6, 6), prefix), wanted["resized"], **tolerance)


def test_each_method_is_that_of_its_library():
    table, wanted, tolerance = golden("posembed_resize_misc")
    found = {
        "openclip_6x6": resize_positions(table, (6, 6), method="bicubic_antialias"),
        "timm_6x6": resize_positions(table, (6, 6), method="bicubic_antialias"),
        "hf_6x6": resize_positions(table, (6, 6)),
        "hf_4x7": resize_positions(table, (4, 7)),
        "vilt_3x6": resize_positions(table, (3, 6), method="bilinear_corners")[1:].T.reshape(1, -1, 3, 6),
    }
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], **tolerance)


def test_smaller_grids_and_grids_that_are_no_square():
    torch.manual_seed(0)
    table = torch.randn(1, 2 + 6 * 4, 8)
    found = resize_positions(table, (3, 5), prefix=2, method="bicubic_antialias", stored=(6, 4))
    reference = resample_abs_pos_embed(table, (3, 5), old_size=(6, 4), num_prefix_tokens=2, antialias=True)
    torch.testing.assert_close(found, reference)


def test_shape_type_and_prefix_are_kept():
    table = torch.randn(17, 8).half()
    found = resize_positions(table, (2, 2))
    assert found.shape == (5, 8) and found.dtype == torch.float16 and torch.equal(found[0], table[0])
    assert resize_positions(table, (4, 4)) is table
    assert resize_positions(torch.randn(1, 16, 8), (2, 3), prefix=0).shape == (1, 6, 8)


def test_a_pretrained_vit_at_another_size_is_timms():
    small, large = (timm.create_model("vit_tiny_patch16_224", img_size=s, depth=1) for s in (32, 64))
    table = small.pos_embed.detach()
    torch.testing.assert_close(
        resize_positions(table, large.patch_embed.grid_size, method="bicubic_antialias"),
        resample_abs_pos_embed(table, large.patch_embed.grid_size, num_prefix_tokens=1),
    )


def test_gradients_pass():
    table = torch.randn(1, 5, 4, requires_grad=True)
    resize_positions(table, (3, 3), method="bilinear_corners").sum().backward()
    assert table.grad is not None and table.grad.abs().min() > 0


@pytest.mark.parametrize("stored, words", [(None, "not a square"), ((2, 4), "not a 2 x 4 grid")])
def test_a_table_that_does_not_fit_is_refused(stored, words):
    with pytest.raises(ValueError, match=words):
        resize_positions(torch.randn(1, 7, 4), (3, 3), stored=stored)
