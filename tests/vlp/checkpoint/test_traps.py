"""The traps of published models: which test fails where one is fallen into, and the tests that stand nowhere else.

Numbers are those of the collection of facts about models that this project was begun with.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_batch, tiny_model
from safetensors.torch import load_file
from standins import GOLDENS

from objectives import ItcConfig, ItmConfig
from objectives.base import Draw
from scripts.goldens.base import Adapter, Case, run_case
from scripts.goldens.cases import ADAPTERS
from vlp.checkpoint.inspect import inspect
from vlp.config import load
from vlp.run import RunConfig

HERE = Path(__file__).parent

TRAPS: dict[str, tuple[str, ...]] = {
    "1 a loss of weight below one vanishes (ViLT's set_task)": ("test_traps.py::test_fractional_weights_count",),
    "2 METER leaves out CLIP's last block": (
        "test_traps.py::test_meter_has_eleven_blocks",
        "test_meter.py::test_recorded",
    ),
    "3 LXMERT: one cross-attention for both directions, vision losses times 6.667, l2 is SmoothL1": (
        "test_hf_regions.py::test_lxmert_pretraining",
        "test_traps.py::test_lxmert_weighs_its_vision_losses",
    ),
    "4 ViLBERT: pooled product, a vision feed-forward of 1024, overlapping boxes are hidden too": (
        "test_volta.py::test_structures",
        "test_traps.py::test_vilberts_sizes",
        "../data/test_region_data.py::test_what_overlaps_a_predicted_region_is_hidden",
    ),
    "5 UNITER is cased": ("test_traps.py::test_uniter_reads_cased_words",),
    "7 BLIP: [ENC] in place of [CLS] where a text is fused, label smoothing 0.1": (
        "test_traps.py::test_the_wrong_setting_is_noticed",
        "test_traps.py::test_blip_smooths_its_labels",
        "test_no_silent_errors.py::test_written_texts_begin_as_the_config_says",
    ),
    "8 BLIP's decoder shares all but its self-attention": (
        "test_blip.py::test_pretraining_shares_all_but_self_attention",
    ),
    "9 VLMo: the mean of two contrastive terms; queries and values have a bias, keys none": (
        "test_traps.py::test_the_wrong_setting_is_noticed",
        "test_vlmo.py::test_stand_in",
    ),
    "10 BEiT-3 as released: decoupled attention, no vision-language feed-forward": (
        "test_beit3.py::test_recorded",
        "test_beit3.py::test_stand_in",
    ),
    "11 CoCa: poolers one behind the other (paper) or side by side (open_clip)": (
        "test_tmm.py::test_cascaded_coca",
        "test_coca.py::test_random",
    ),
    "12 FLAVA: a projection as wide as the towers; contrast of what is not masked": (
        "test_hf_flava.py::test_pretraining",
        "test_hf_flava.py::test_model",
    ),
    "14 SigLIP: bias of -10, text padded to its full length and never masked": (
        "test_hf_clip.py::test_siglip",
        "test_traps.py::test_siglip_attends_its_padding",
        "../data/test_tokenizer_families.py::test_siglip_cleans_pads_and_attends_its_padding",
    ),
    "15 mean and std go with the tag, QuickGELU with OpenAI's weights": (
        "test_open_clip.py::test_by_model_and_tag",
        "test_open_clip.py::test_openai_archive",
        "test_traps.py::test_the_wrong_setting_is_noticed",
    ),
    "16 pre_layrnorm is spelt so": ("test_hf_clip.py::test_clip", "test_export.py::test_clip_of_transformers"),
    "20 defaults of transformers: 512 features of VisualBERT, two labels of ViLT": (
        "test_traps.py::test_sizes_are_the_files_not_the_class_defaults",
    ),
    "activation": ("test_hf_clip.py::test_clip", "test_traps.py::test_the_wrong_setting_is_noticed"),
    "epsilon of the norms": ("test_hf_clip.py::test_clip", "test_traps.py::test_the_wrong_setting_is_noticed"),
    "mean, std, resize mode, interpolation": (
        "../data/test_presets.py::test_hf_processor_is_transformers",
        "../data/test_presets.py::test_openclip_is_open_clips",
        "test_no_silent_errors.py::test_open_clip_cuts_as_we_do_or_it_is_said",
        "test_no_silent_errors.py::test_pixels_beyond_the_last_whole_patch",
    ),
    "how positions are interpolated": (
        "test_blip.py::test_positions_are_resized_as_the_authors_do",
        "test_open_clip.py::test_another_image_size_interpolates_as_open_clip_does",
        "test_traps.py::test_the_wrong_setting_is_noticed",
    ),
    "tokenizer, its case and its cleaning": (
        "../data/test_tokenizer_families.py::test_wordpiece_is_berts",
        "../data/test_tokenizer_families.py::test_blips_two_tokens",
    ),
    "ALBEF's NLVR2 shares keys and values of two layers": ("test_albef.py::test_verdicts",),
    "legacy ends of CLIP's texts (eos_token_id 2)": (
        "test_hf_clip.py::test_clip",
        "test_hf_clip.py::test_clip_of_older_files",
    ),
}
"""Trap -> tests that fail in it."""
ELSEWHERE = {
    6: "ALBEF's warm-up and staircase: a schedule, stated as a deviation in its recipe",
    13: "OFA is not loaded",
    17: "which images are COCO's train split: a data set, not a checkpoint",
    18: "a row of another library's documentation",
    19: "a cell of a results table",
    21: "slips of a survey",
}
"""Traps that no checkpoint can lead into."""


def test_every_trap_has_tests_that_exist() -> None:
    numbers = {int(trap.split()[0]) for trap in TRAPS if trap[0].isdigit()}
    assert not numbers & ELSEWHERE.keys() and numbers | ELSEWHERE.keys() == set(range(1, 22))
    for trap, tests in TRAPS.items():
        assert tests, trap
        for test in tests:
            file, _, name = test.partition("::")
            tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
            assert name in {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}, (trap, test)


# A recorded case that still passed with a wrong setting would not have shown it.
CLIP = "openclip_vit_quickgelu"
WRONG: dict[str, tuple[str, Mapping[str, Any]]] = {
    "[ENC] of BLIP": ("blip_pretrain", {"model": {"text": {"fused_first": None}}}),
    "VLMo's two terms": ("vlmo_pretrain", {"objectives": {"itc": {"weight": 1.0}, "itc_vl": {"weight": 1.0}}}),
    "QuickGELU of an image tower": (CLIP, {"model": {"vision": {"arguments": {"act_layer": "gelu"}}}}),
    "QuickGELU of a text tower": (CLIP, {"model": {"text": {"activation": "gelu"}}}),
    "activation": ("hf_siglip", {"model": {"text": {"activation": "quick_gelu"}}}),
    "epsilon": ("hf_vilt", {"model": {"fusion": {"eps": 1e-2}}}),
    "positions of ViLT": ("vilt_infer", {"model": {"vision": {"position_resize": "bilinear_antialias"}}}),
}


def adapter_of(case: Case) -> Adapter:
    return next(one for pattern, one in ADAPTERS.items() if re.fullmatch(pattern, case.name))


@pytest.mark.parametrize("what", WRONG)
def test_the_wrong_setting_is_noticed(what: str) -> None:
    name, settings = WRONG[what]
    case = Case(GOLDENS / name)
    case.__dict__["gradients"] = {}  # the values are enough
    found = run_case(case, replace(adapter_of(case), settings=lambda _: settings))[1]
    assert not found.passed, found.line()


def test_fractional_weights_count() -> None:
    model = tiny_model("dual_stream", {"itc": ItcConfig(weight=0.25), "itm": ItmConfig(weight=0.5)})
    total, outputs = model(tiny_batch(4), Draw(0))
    wanted = 0.25 * outputs["itc"].loss + 0.5 * outputs["itm"].loss
    torch.testing.assert_close(total, wanted)
    assert outputs["itc"].loss > 0 and outputs["itm"].loss > 0


@cache
def recipe(name: str) -> RunConfig:
    return load(RunConfig, f"pretrain/{name}")


def test_blip_smooths_its_labels() -> None:
    for name in ("blip_decoder", "blip_pretrain"):
        assert inspect(GOLDENS / name / "model.pth").config.objectives["lm"].label_smoothing == 0.1
    assert recipe("blip").objectives["lm"].label_smoothing == 0.1


def test_meter_has_eleven_blocks() -> None:
    vision = recipe("meter").model.vision
    with torch.device("meta"):
        clip = vision.model_copy(update={"depth": None, "pretrained": False}).build()
    assert vision.depth == len(clip.vit.blocks) - 1 == 11
    case = Case(GOLDENS / "meter_infer")
    names = torch.load(case.weights, weights_only=True)["state_dict"]
    stored = {int(found[1]) for name in names if (found := re.search(r"visual\.transformer\.resblocks\.(\d+)\.", name))}
    assert inspect(case.weights, adapter_of(case).config(case)).config.model.vision.depth == len(stored)


def test_lxmert_weighs_its_vision_losses() -> None:
    losses = [one for one in recipe("lxmert").objectives.values() if one.kind == "mrm"]
    targets = {name: target for one in losses for name, target in one.targets.items()}
    assert {name: target.weight for name, target in targets.items()} == dict.fromkeys(targets, 6.667)
    assert len(targets) == 3 and targets["features"].losses == ("smooth_l1",)


def test_vilberts_sizes() -> None:
    fusion = recipe("vilbert").model.fusion
    assert (fusion.pooler, fusion.image_hidden) == ("product", 1024)


def test_uniter_reads_cased_words() -> None:
    case = Case(GOLDENS / "uniter_mlm")
    assert inspect(case.weights, adapter_of(case).config(case)).config.data.tokenizer.source == "bert-base-cased"
    assert recipe("uniter_base").data.tokenizer.source == "bert-base-cased"


def test_siglip_attends_its_padding() -> None:
    data = inspect(GOLDENS / "hf_siglip").config.data
    assert data.tokenizer.fixed_length == data.max_length
    published = recipe("siglip_b16")
    assert published.data.tokenizer.fixed_length == 64 == published.data.max_length
    assert published.model.embed.logit_bias == -10


def test_sizes_are_the_files_not_the_class_defaults(tmp_path: Path) -> None:
    """Without a config.json, features and answers are counted in the file."""
    found = {}
    for name in ("hf_visualbert", "hf_vilt_vqa"):
        shutil.copy(GOLDENS / name / "model.safetensors", tmp_path / f"{name}.safetensors")
        found[name] = inspect(tmp_path / f"{name}.safetensors").config, load_file(tmp_path / f"{name}.safetensors")
    config, stored = found["hf_visualbert"]
    features = next(one for name, one in stored.items() if name.endswith("visual_projection.weight")).shape[1]
    assert config.model.vision.features == features != 512
    config, stored = found["hf_vilt_vqa"]
    assert len(config.objectives["answer"].answers) == len(stored["classifier.3.bias"]) != 2
