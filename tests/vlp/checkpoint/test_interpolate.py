"""WiSE-FT: a model between two checkpoints, whose ends are these."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import save
from helpers import OBJECTIVES, tiny_model

import vlp
from vlp.checkpoint.interpolate import interpolate
from vlp.checkpoint.native import weights_of
from vlp.cli import main
from vlp.loaded import Loaded
from vlp.model import Model


def stored(folder: Path, model: Model) -> Loaded:
    save(folder, model)
    return vlp.load(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pretrained model, and one with other weights and another head."""
    folder = tmp_path_factory.mktemp("pair")
    save(folder / "a", tiny_model("dual_stream", ("itc", "itm", "mlm"), seed=1))
    save(folder / "b", tiny_model("dual_stream", {"itc": OBJECTIVES["itc"], "answer": OBJECTIVES["answer"]}, seed=2))
    return folder / "a", folder / "b"


def test_ends_and_middle(pair: tuple[Path, Path]) -> None:
    first, second = (vlp.load(path) for path in pair)
    ours, theirs = weights_of(first.model), weights_of(second.model)
    for alpha in (0.0, 0.25, 1.0):
        found = interpolate(first, second, alpha)
        for name, weight in weights_of(found.model).items():
            wanted = theirs[name] if name not in ours else (1 - alpha) * ours[name] + alpha * theirs[name]
            torch.testing.assert_close(weight, wanted)
    assert all(name.startswith(("objectives.answer.", "fusion.")) for name in found.report.missing)
    assert all(name.startswith(("objectives.mlm.", "objectives.itm.", "fusion.")) for name in found.report.unexpected)
    torch.testing.assert_close(weights_of(second.model), theirs, rtol=0, atol=0)


def test_larger_images(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The finetuned one may read a higher resolution, with its position embeddings resized."""
    first = vlp.load(pair[0])
    second = vlp.load(pair[0], settings={"model": {"vision": {"image_size": 32}}})
    assert second.model.vision.vit.pos_embed.shape[1] > first.model.vision.vit.pos_embed.shape[1]
    found = interpolate(first, second, 0.3)
    torch.testing.assert_close(weights_of(found.model), weights_of(second.model))


def test_command(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "c"
    assert main(["interpolate", str(pair[0]), str(pair[1]), "--alpha", "0.25", "--out", str(out)]) == 0
    found, wanted = vlp.load(out), interpolate(vlp.load(pair[0]), vlp.load(pair[1]), 0.25)
    assert torch.equal(
        weights_of(found.model)["vision.vit.cls_token"], weights_of(wanted.model)["vision.vit.cls_token"]
    )


def test_mistakes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = (vlp.load(path) for path in pair)
    with pytest.raises(ValueError, match=r"--alpha 1\.5 must lie in 0"):
        interpolate(first, second, 1.5)
    other = stored(tmp_path / "other", tiny_model("dual_stream", ("itc", "itm")))
    with torch.no_grad():
        other.model.vision.vit.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 16))
    with pytest.raises(ValueError, match="the two checkpoints are not of one model: the weights do not fit"):
        interpolate(other, second, 0.5)
