"""`vlp.load`: sources, devices, what a loaded model can do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from checkpoints import outputs, run_of, save, tokenizer
from helpers import LENGTH, SIZES, tiny_batch, tiny_model
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

import vlp
from objectives import ItcConfig, ItmConfig, LmConfig
from vlp.checkpoint.card import model_card
from vlp.checkpoint.native import checkpoint_folder
from vlp.data.decode import read_image
from vlp.decoder import DecoderConfig
from vlp.model import Model, build_model

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["a red car", "a dog and a cat", "", "a red dog " * 20]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("dual_stream", ["itc", "itm", "lm", "answer"], seed=2)


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint, the weights with matching and answers that differ visibly between inputs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.dim() > 1:
                parameter.mul_(4)
    run = tmp_path_factory.mktemp("run")
    save(checkpoint_folder(run, 64), model)
    return run


@pytest.fixture(scope="module")
def loaded(folder: Path) -> vlp.Loaded:
    return vlp.load(folder)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)) for i in range(4)]


def test_the_loaded_model_is_the_saved_one(loaded: vlp.Loaded, model: Model) -> None:
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    for ours, theirs in zip(outputs(loaded.model, tiny_batch(3)), outputs(model, tiny_batch(3)), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.report.summary() == f"{len(loaded.report.loaded)} loaded"
    assert loaded.config.data.train == "gone/{000..099}.tar" and loaded.config.objectives["itm"].kind == "itm"
    assert loaded.tokenizer.vocabulary == tokenizer().vocabulary and str(loaded.device) == "cpu"


def test_there_must_be_something_to_choose_from(loaded: vlp.Loaded, images: list[Image.Image]) -> None:
    """Nothing to work on gives nothing, of the right shape."""
    assert loaded.classify([], ["dog", "cat"]).shape == (0, 2) and loaded.embed_texts([]).shape == (0, 16)
    assert loaded.answer([], []) == []
    with pytest.raises(ValueError, match=r"^names is empty; give at least one$"):
        loaded.classify(images, [])
    with pytest.raises(ValueError, match=r"^names should be strings, not int: 3$"):
        loaded.classify(images, ["dog", 3])  # type: ignore[list-item]


OTHERS = {
    "x.csv": (b"image,caption\n0.png,a dog\n", r"it is a table \(\.csv\), no checkpoint; give a checkpoint or run"),
    "x.png": (b"\x89PNG\r\n\x1a\n\0\0", r"an image \(\.png\)"),
    "own.yaml": (b"model: {}\n", r"a recipe or config \(\.yaml\)"),
    "notes": (b"a plain text\n", "a text file"),
    "empty": (b"", "an empty file"),
    "index.npz": (b"PK\x03\x04", r"a file of numpy's arrays \(\.npz\)"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_is_no_checkpoint_is_said_to_be_what_it_is(tmp_path: Path, name: str) -> None:
    content, what = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^cannot load .*{name}: .*{what}") as error:
        vlp.load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_embeddings_do_not_depend_on_the_batch(loaded: vlp.Loaded, images: list[Image.Image]) -> None:
    vectors = loaded.embed_images(images)
    assert vectors.shape == (4, 16) and vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(loaded.embed_images(images, batch_size=3), vectors)
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3
    words = loaded.embed_texts(TEXTS)
    assert words.shape == (4, 16)
    torch.testing.assert_close(loaded.embed_texts(TEXTS, batch_size=1), words)
    # A long text is cut at data.max_length tokens.
    cut = loaded.tokenizer.decode(loaded.tokenizer.encode(TEXTS[3], LENGTH)[0])
    torch.testing.assert_close(loaded.embed_texts([cut])[0], words[3])


def test_embeddings_can_be_trained_on(loaded: vlp.Loaded, images: list[Image.Image]) -> None:
    probe = torch.nn.Linear(16, 2)
    probe(loaded.embed_images(images)).sum().backward()
    assert probe.weight.grad is not None and probe.weight.grad.abs().sum() > 0


def test_match_is_the_probability_of_the_matching_head(loaded: vlp.Loaded, images: list[Image.Image]) -> None:
    found = loaded.match(images, TEXTS, batch_size=3)
    assert found.shape == (4,) and found.std() > 1e-4
    for i in range(4):
        ids = torch.from_numpy(loaded.tokenizer.encode(TEXTS[i], LENGTH)[0])[None]
        texts = vlp.Texts(ids, torch.ones_like(ids, dtype=torch.bool))
        pixels = torch.nn.functional.interpolate(read_image(images[i])[None], (16, 16), mode="bicubic", antialias=True)
        batch = vlp.Batch(images={"clean": vlp.Images(pixels)}, texts={"clean": texts})
        pooled = loaded.model.run([vlp.Fuse()], batch)[vlp.Fuse()].pooled
        torch.testing.assert_close(found[i], loaded.model.objectives["itm"].head(pooled).softmax(1)[0, 1])


def test_answers_come_from_the_answer_list(
    loaded: vlp.Loaded, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = ["a dog", "a red car", "red", "cat and dog"]
    answers = loaded.answer(images, questions, batch_size=3)
    assert answers == [loaded.answer([i], [q])[0] for i, q in zip(images, questions, strict=True)]
    assert set(answers) <= {"yes", "no", "maybe"}
    head = loaded.model.objectives["answer"].head[-1]
    with monkeypatch.context() as patch:
        patch.setattr(head, "bias", torch.nn.Parameter(head.bias + torch.tensor([0.0, 0.0, 1e4])))
        assert loaded.answer(images, questions) == ["maybe"] * 4


def test_answers_are_written_where_there_is_no_list(tmp_path: Path, images: list[Image.Image]) -> None:
    config = tiny_model("single_stream", ["itm"]).config
    config = config.model_copy(update={"decoder": DecoderConfig(**SIZES, memory="text")})
    objectives = {"itm": ItmConfig(), "lm": LmConfig(memory="fused", view="lm:answer")}
    written = vlp.load(save(tmp_path / "one", build_model(config, objectives, seed=5)))
    answers = written.answer(images, ["a dog", "a cat", "a car", "red"], batch_size=2)
    assert len(answers) == 4 and all(isinstance(answer, str) for answer in answers)
    # Given answers are ranked instead: the same whatever else is asked, and the best of all where all are looked at.
    given = ["a dog", "red", "a dog and a cat", "blue"]
    questions = ["a dog", "a cat", "a car", "red"]
    ranked = written.answer(images, questions, given, batch_size=3)
    assert set(ranked) <= set(given)
    assert ranked == [written.answer([i], [q], given)[0] for i, q in zip(images, questions, strict=True)]
    assert written.answer(images, questions, given[1:2], k=1) == ["red"] * 4
    assert written.answer([], [], given) == []
    with pytest.raises(ValueError, match=r"^answers is empty; give at least one$"):
        written.answer(images, questions, [])
    with pytest.raises(ValueError, match="cannot write captions"):
        written.caption(images)


def test_captions_are_written_from_the_image(loaded: vlp.Loaded, images: list[Image.Image]) -> None:
    captions = loaded.caption(images, batch_size=3)
    assert captions == loaded.caption(images) and len(captions) == 4
    assert loaded.caption(images, method="beam", beams=2, max_length=6) == loaded.caption(
        images, method="beam", beams=2, max_length=6, batch_size=1
    )
    with pytest.raises(ValueError, match="beamz = 2: unknown field; perhaps you meant beams"):
        loaded.caption(images, beamz=2)


def test_classes_are_told_apart_by_name(loaded: vlp.Loaded, images: list[Image.Image]) -> None:
    names = ["dog", "red car", "cat"]
    found = loaded.classify(images, names, "a {}")
    assert found.shape == (4, 3)
    torch.testing.assert_close(found.sum(1), torch.ones(4))
    scale = loaded.model.space().logit_scale.exp()
    logits = scale * loaded.embed_images(images) @ loaded.embed_texts([f"a {name}" for name in names]).T
    torch.testing.assert_close(found, logits.softmax(1))
    assert not torch.allclose(found, loaded.classify(images, names, "{}"))
    with pytest.raises(ValueError, match=r"template 'a photo' has no place for the class name"):
        loaded.classify(images, names, "a photo")


def test_nothing_gives_nothing(loaded: vlp.Loaded) -> None:
    assert loaded.embed_images([]).shape == (0, 16) and loaded.match([], []).shape == (0,) and loaded.caption([]) == []


CANNOT: list[tuple[str, dict[str, Any], Callable[[vlp.Loaded, Any], Any], str]] = [
    (
        "none",
        {"itc": ItcConfig()},
        lambda m, i: m.match(i, ["a"]),
        "has no fusion .* cannot match; train one with .* itm, or use embed_images, embed_texts, classify",
    ),
    ("none", {"itc": ItcConfig()}, lambda m, i: m.answer(i, ["a"]), "has no fusion .* cannot answer questions"),
    ("none", {"itc": ItcConfig()}, lambda m, i: m.caption(i), "cannot write captions .*objective lm"),
    ("dual_stream", {"mlm": None}, lambda m, i: m.match(i, ["a"]), "no matching head .*pretrain with objective itm"),
    (
        "dual_stream",
        {"mlm": None},
        lambda m, i: m.answer(i, ["a"]),
        "cannot answer questions .*finetune it on questions",
    ),
    ("dual_stream", {"mlm": None}, lambda m, i: m.embed_images(i), "no common space .*pretrain with objective itc"),
    ("dual_stream", {"mlm": None}, lambda m, i: m.classify(i, ["a"]), "no common space .*its objectives are mlm"),
]


@pytest.mark.parametrize(("fusion", "objectives", "ask", "message"), CANNOT)
def test_what_a_checkpoint_cannot_do_has_a_remedy(
    tmp_path: Path, images: list[Image.Image], fusion: str, objectives: dict[str, Any], ask: Callable, message: str
) -> None:
    loaded = vlp.load(save(tmp_path / "one", tiny_model(fusion, list(objectives))))
    with pytest.raises(ValueError, match=message) as error:
        ask(loaded, images[:1])
    assert "\n" not in str(error.value)


def test_images_of_every_kind(loaded: vlp.Loaded, images: list[Image.Image], tmp_path: Path) -> None:
    images[0].save(tmp_path / "a.png")
    given = [images[0], tmp_path / "a.png", str(tmp_path / "a.png"), images[0].convert("RGBA")]
    found = loaded.embed_images(given)
    # Equal pixels; the place in the batch may change the last bits of a matrix product.
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=0, atol=1e-6)
    others = [images[0].convert(mode) for mode in ("L", "1", "P", "LA", "CMYK")]
    assert loaded.embed_images(others).isfinite().all()
    torch.testing.assert_close(loaded.embed_images([others[0]]), loaded.embed_images([others[0].convert("RGB")]))


def test_images_that_cannot_be_read_are_named_in_one_line(
    loaded: vlp.Loaded, images: list[Image.Image], tmp_path: Path
) -> None:
    images[0].save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "torn.jpg").write_bytes(content[:-30])
    (tmp_path / "text.png").write_text("no image")
    lazy = Image.open(tmp_path / "torn.jpg")
    cases: list[tuple[Any, str]] = [
        ([tmp_path / "gone.png"], r"image .*gone\.png: cannot be read \(No such file or directory\); check the path"),
        ([tmp_path / "torn.jpg"], r"image .*torn\.jpg: broken image"),
        ([tmp_path / "text.png"], r"image .*text\.png: not an image"),
        ([lazy], r"image .*torn\.jpg: .*truncated"),
        ([Image.new("F", (4, 4))], "floating-point pixels"),
        ([tmp_path], "cannot be read"),
        ([3], "should be Pillow images or paths, not int"),
        (str(tmp_path / "whole.jpg"), r"images should be a list, not one str; write \[...\]"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            loaded.embed_images(given)
        assert "\n" not in str(error.value)


def test_wrong_arguments_are_named(loaded: vlp.Loaded, images: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="4 images but 1 texts; give one of each"):
        loaded.match(images, ["a dog"])
    with pytest.raises(ValueError, match="texts should be a list, not one str"):
        loaded.embed_texts("a dog")
    with pytest.raises(ValueError, match="texts should be strings, not int: 3"):
        loaded.embed_texts([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="batch_size 0 should be at least 1"):
        loaded.embed_texts(["a"], batch_size=0)


def test_device_and_dtype(folder: Path, loaded: vlp.Loaded, images: list[Image.Image]) -> None:
    half = vlp.load(folder, dtype="bfloat16", device=torch.device("cpu"))
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    found = half.embed_images(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    assert (found * loaded.embed_images(images)).sum(1).min() > 0.98
    assert half.match(images, TEXTS).dtype == torch.float32 and len(half.caption(images[:1])) == 1
    assert vlp.load(folder, dtype=torch.float64).embed_images(images).dtype == torch.float32
    for wrong in ("int8", "float99", torch.int64):
        with pytest.raises(ValueError, match="cannot be used; use float32"):
            vlp.load(folder, dtype=wrong)
    for device in ("warp", "meta:x"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
            vlp.load(folder, device=device)


def test_settings_are_laid_over_the_stored_ones(folder: Path, images: list[Image.Image]) -> None:
    larger = vlp.load(folder, settings={"model": {"vision": {"image_size": 32}}})
    assert larger.report.resized == ("vision.vit.pos_embed",)
    assert larger.embed_images(images).shape == (4, 16)
    small = vlp.load(folder, settings={"objectives": {"answer": None}}, ignore=["objectives.answer.*"])
    assert "answer" not in small.model.objectives and small.report.ignored
    with pytest.raises(ValueError, match=r"unexpected objectives\.answer\..* and 3 more"):
        vlp.load(folder, settings={"objectives": {"answer": None}})
    answers = {"answers": ["a", "b", "c"]}
    more = {"objectives": {"second": {"kind": "answer", **answers}}}
    with pytest.raises(ValueError, match=r"missing objectives\.second\.head"):
        vlp.load(folder, settings=more)
    assert len(vlp.load(folder, settings=more, allow_missing=["objectives.second.*"]).report.missing) == 6
    with pytest.raises(ValueError, match=r"model\.visoin.*perhaps you meant vision \(settings=\)"):
        vlp.load(folder, settings={"model": {"visoin": {}}})


def test_addresses_are_read_through_fsspec(folder: Path, loaded: vlp.Loaded, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/run", recursive=True)
    for address in ("memory://bucket/run", f"memory://bucket/run/checkpoints/{64:012d}", folder.as_uri()):
        assert torch.equal(vlp.load(address).embed_texts(TEXTS), loaded.embed_texts(TEXTS))
    missing = r"memory://bucket/none: there is no manifest\.json and no known file of weights; give a"
    with pytest.raises(ValueError, match=missing):
        vlp.load("memory://bucket/none")
    with pytest.raises(ValueError, match=r"cannot load warp://x: .*check the address"):
        vlp.load("warp://x")


def test_a_hub_id_is_fetched_manifest_first(
    folder: Path, loaded: vlp.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any, list[str]]] = []
    checkpoint = folder / "checkpoints" / f"{64:012d}"

    def snapshot(repo_id: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, allow_patterns))
        return str(checkpoint if repo_id == "someone/model" else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = vlp.load("someone/model@v2")
    assert torch.equal(found.embed_texts(TEXTS), loaded.embed_texts(TEXTS))
    assert asked[0] == ("someone/model", "v2", ["manifest.json"])
    assert {"model.safetensors", "config.yaml", "tokenizer.json"} <= set(asked[1][2]) and len(asked) == 2
    with pytest.raises(ValueError, match="the hub's repository holds no weights; give a checkpoint"):
        vlp.load("someone/foreign")
    assert asked[2] == ("someone/foreign", None, ["manifest.json"]) and "*.safetensors" in asked[3][2]


def test_a_hub_id_offline_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Cannot find the snapshot in the cache\nand outgoing traffic is disabled.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"no such folder, and the hub does not give it \(Cannot find") as error:
        vlp.load("someone/model")
    assert "\n" not in str(error.value)


def test_the_real_hub_client_honours_offline() -> None:
    """With the switch set nothing goes over the network: the answer comes at once."""
    code = "import vlp\ntry:\n vlp.load('nobody/nothing')\nexcept ValueError as error:\n print(error)"
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HF_HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("cannot load nobody/nothing: no such folder, and the hub does not give it")
    assert found.stdout.count("\n") == 1


def test_other_sources_say_what_can_be_loaded(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "strange.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    weights = folder / "checkpoints" / f"{64:012d}" / "model.safetensors"
    cases = {
        tmp_path / "empty.pt": "nothing of it was executed",
        tmp_path / "strange.pt": "its weights (weight, ...) are of no family that vlp reads",
        weights: f"{weights.parent} is a checkpoint, give that",
        tmp_path / "folder": "0 files of weights in the folder; name the file itself",
        tmp_path / "none": "no such folder; give a checkpoint or a run folder",
    }
    for source, message in cases.items():
        with pytest.raises(ValueError) as error:
            vlp.load(source)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_relative_path_below_a_known_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="checkpoint runs/typo: no such folder"):
        vlp.load("runs/typo")


def test_the_model_card_says_what_it_is(model: Model) -> None:
    card = model_card(
        run_of(model),
        {"test": {"r@1": 0.123456}, "loss": torch.tensor(2.5)},
        "vlp pretrain demo",
        model,
        data={"samples": 1106},
    )
    assert yaml.safe_load(card.split("---")[1])["license"] == "unknown"
    wanted = ["| test.r@1 | 0.1235 |", "| loss | 2.5 |", "vlp pretrain demo", "- samples: 1106", "gone/{000..099}.tar"]
    total = f"{sum(p.numel() for p in model.parameters()):,}"
    for text in [*wanted, f"| all | {total} |", "fusion `dual_stream`", f"- torch {torch.__version__.split('+')[0]}"]:
        assert text in card
    assert "Not stated" in card and "CC-BY" in model_card(run_of(model), {}, "", model, licence="CC-BY-4.0")


def test_the_model_card_shows_how_to_load(
    folder: Path, images: list[Image.Image], tmp_path: Path, model: Model
) -> None:
    images[0].save(tmp_path / "image.png")
    code = model_card(run_of(model), {}, "", model).split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(
        code.replace("this folder or its id on the hub", str(folder)).replace("image.png", str(tmp_path / "image.png")),
        names,
    )
    assert names["vectors"].shape == (1, 16)
