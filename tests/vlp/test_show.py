"""`vlp show`: plan, FLOPs and parameters; and that sharing passes changes neither losses nor gradients."""

import io
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny_batch, tiny_model
from rich.console import Console
from test_recipes import RECIPES, resolved

from objectives.base import Draw
from vlp.cli import main
from vlp.cli.looking import stored
from vlp.config import load
from vlp.recipes import dump_yaml, read_tree
from vlp.run import RunConfig, settle
from vlp.show import count_flops, flops, meta_model, plan_rows, show, synthetic_batch
from vlp.shrink import shrink


@pytest.fixture(scope="module")
def albef():
    run = load(RunConfig, "pretrain/albef")
    model = meta_model(run)
    return model, synthetic_batch(model, 8, run.data.max_length)


def test_albef_encodes_each_image_once(albef):
    plan = plan_rows(*albef)
    encodes = {row.what: (row.rows, row.used_by) for row in plan.rows if row.kind == "encode"}
    assert encodes["image clean"] == (1, ("itc", "itm", "mlm"))
    assert encodes["image clean, by the teacher"] == (1, ("itc", "mlm"))
    own = {"image clean", "text clean", "text masked"}
    assert set(encodes) == own | {f"{what}, by the teacher" for what in own}
    once = {"vision": 1, "text": 2, "fusion": 1}
    assert plan.calls == once | {f"teacher's {part}": number for part, number in once.items()}
    fused = {row.what: (row.rows, row.used_by) for row in plan.rows if row.kind == "fuse"}
    assert fused == {
        "image clean + text clean": (1, ("itm",)),
        "image clean + text clean, pairs that itm draws": (2, ("itm",)),
        "image clean + text masked": (1, ("mlm",)),
        "image clean + text masked, by the teacher": (1, ("mlm",)),
    }


def test_albef_shares_at_least_half(albef):
    shared, alone = flops(*albef)
    assert set(alone) == {"itc", "itm", "mlm"}
    assert shared <= 0.5 * sum(alone.values())
    # By hand, per sample and forward: ViT 46 GFLOPs, two texts through six layers 5.2, four fused rows 12.6, their
    # image keys and values 3.6, words at the masked positions 0.2; by the teacher the same with one fused row.
    assert shared / 1e9 == pytest.approx(67.7 + 67.7 - 3 * 12.6 / 4, rel=0.01)


def test_flops_of_clip_are_the_published_ones():
    run = load(RunConfig, "pretrain/clip_vit_b32")
    model = meta_model(run)
    shared, alone = flops(model, synthetic_batch(model, 8, run.data.max_length))
    assert shared == alone["itc"]
    assert shared / 1e9 == pytest.approx(14.78, abs=0.005)  # open_clip's table, one pair with 77 tokens


def test_decoder_reads_the_image_that_is_encoded_anyway():
    model = tiny_model("dual_stream", ("itc", "itm", "mlm", "lm"))
    plan = plan_rows(model, tiny_batch(4))
    assert plan.calls == {"vision": 1, "text": 2, "fusion": 1, "decoder": 1}
    decode = next(row for row in plan.rows if row.kind == "decode")
    assert (decode.what, decode.rows, decode.used_by) == ("text causal, memory image clean", 1, ("lm",))
    image = next(row for row in plan.rows if row.what == "image clean" and row.kind == "encode")
    assert image.used_by == ("itc", "itm", "mlm", "lm")


def test_what_is_printed():
    out = io.StringIO()
    Console(file=out, width=160).print(show(load(RunConfig, "pretrain/albef")))
    text = out.getvalue()
    for wanted in (
        "bert-base-uncased",
        "teacher's fusion x 1; 5 fused rows per sample",
        "85.84",
        "209.94",
        "one step, passes shared",
    ):
        assert wanted in text


@pytest.mark.parametrize("fusion", ["none", "single_stream", "dual_stream", "co"])
def test_sharing_changes_neither_losses_nor_gradients(fusion):
    names = ("itc", "mlm") if fusion == "none" else ("itc", "itm", "mlm", "lm")
    model = tiny_model(fusion, names).double()
    batch = tiny_batch(6)
    shared, outputs = model(batch, Draw(0))
    shared.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for name in names:
        alone, output = model(batch, Draw(0), names=[name])
        alone.backward()
        torch.testing.assert_close(output[name].loss, outputs[name].loss, rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, together[name], rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_plan_and_flops(recipe):
    """At small sizes: what a step computes hangs on kinds alone."""
    run = settle(shrink(resolved(recipe)))
    model = meta_model(run)
    batch = synthetic_batch(model, 4, run.data.max_length, only=run.data.only)
    plan = plan_rows(model, batch)
    active = list(model.active(batch))
    assert set(active) <= {name for row in plan.rows for name in row.used_by}
    assert count_flops(model, batch, active) > 0


@pytest.mark.parametrize("recipe", ["blip", "siglip_b16", "beit3_base"])
def test_recipes_are_shown_whole(recipe):
    run = shrink(resolved(f"pretrain/{recipe}"))
    out = io.StringIO()
    Console(file=out, width=160).print(show(run))
    text = out.getvalue()
    assert " alone" in text and "millions" in text and all(name in text for name in run.objectives)


def test_a_text_that_begins_anew_where_it_is_fused():
    """BLIP's [ENC]: the same view is read twice, and only what fuses reads the second."""
    model = meta_model(shrink(resolved("pretrain/blip")))
    plan = plan_rows(model, synthetic_batch(model, 4, 12))
    rows = {row.what: row.used_by for row in plan.rows if row.kind == "encode"}
    assert rows["text clean"] == ("itc", "itm") and rows["text clean, begun as fused texts are"] == ("itm",)


def test_counting_flops_leaves_the_model_as_it_was():
    model = meta_model(shrink(resolved("pretrain/siglip_b16")))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    shared, alone = flops(model, synthetic_batch(model, 4, 12))
    assert shared == alone["sigmoid"] > 0
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


FORMAT_1 = Path(__file__).parent / "checkpoint" / "format_1"


@pytest.mark.parametrize("what", ["config.yaml", "checkpoint", "run", "run with a config"])
def test_runs_are_shown(tmp_path, capsys, monkeypatch, what):
    """Their tokenizer found fewer words than it may have at most."""
    run = tmp_path / "run"
    shutil.copytree(FORMAT_1, run / "checkpoints" / "000000000064")
    if what == "run with a config":
        shutil.copy(FORMAT_1 / "config.yaml", run)
    shown = {"config.yaml": FORMAT_1 / "config.yaml", "checkpoint": FORMAT_1}.get(what, run)
    assert main(["show", str(shown)]) == 0
    assert "itm alone" in capsys.readouterr().out
    (tmp_path / "siglip_b16").mkdir()  # a recipe's name stays one
    monkeypatch.chdir(tmp_path)
    assert stored("siglip_b16") == "siglip_b16" and stored("run").startswith("run")


def test_a_finetuned_run_is_shown_and_its_recipe_is_not(tmp_path, capsys):
    tree = read_tree(FORMAT_1 / "config.yaml")
    tree |= {"task": {"kind": "vqa"}, "init": "runs/x", "objectives": {"answer": {"answers": ["yes", "no"]}}}
    (tmp_path / "config.yaml").write_text(dump_yaml(tree))
    assert main(["show", str(tmp_path)]) == 0
    assert "answer alone" in capsys.readouterr().out
    for name in ("vqa", "finetune/vqa"):
        assert main(["show", name]) == 2
        error = capsys.readouterr().err
        assert "lies over a checkpoint; see it with vlp finetune" in error and error.count("\n") == 1
    assert main(["show", str(tmp_path / "checkpoints")]) == 2
    assert "no such recipe" in capsys.readouterr().err
