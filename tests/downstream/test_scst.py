"""Self-critical training of captioning: its gradient, its effect, and what is refused."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
from helpers import SIZES
from safetensors.torch import load_file
from torch.nn import functional as F

import vlp
from downstream.captioning import CaptionSurvey
from downstream.evaluate import open_data, parts_of
from downstream.finetune import finetune, finetune_config, resume
from downstream.metrics.captioning import cider_d, document_frequencies
from downstream.metrics.tokenize import tokenize
from downstream.scst import Scst, ScstConfig, scored_id, settle_scst
from downstream.task import batches, read_samples
from encoders.types import Tokens
from objectives import Seq2SeqMlmConfig
from objectives.base import Draw, Encode
from vlp.checkpoint.native import find_checkpoint
from vlp.cli import main
from vlp.data.reader import RawSample, Reader, decode_sample
from vlp.generate import DecoderStepper, FusedStepper
from vlp.model import Model
from vlp.train.log import read_metrics

CPU = torch.device("cpu")


def setting(table: Path, samples: int, **task: object) -> dict:
    train = toys.TRAIN | {
        "samples": samples,
        "global_batch": 8,
        "optim": {"lr": 1e-3, "warmup": 0, "weight_decay": 0.0},
    }
    data = {"train": str(table), "val": str(table), "workers": 0}
    task = {"kind": "captioning", "generation": {"method": "greedy"}, **task}
    return {"task": task, "data": data, "train": train, "tune": {"probe": None}}


def score(caption: str, references: tuple[str, ...], df: tuple) -> float:
    return cider_d([tokenize(caption)], [[tokenize(one) for one in references]], df)[1][0]


def toy(folder: Path, writes: str) -> Path:
    """A checkpoint whose decoder writes, or whose fusion does (GIT)."""
    if writes == "decoder":
        return toys.checkpoint(folder, {"lm": {"mean": "texts"}}, fusion={"kind": "none"})
    text, fusion = {**SIZES, "layers": 0, "max_length": 24}, {"kind": "single_stream", **SIZES}
    lm = {"lm": {"mean": "texts", "memory": "beside"}}
    return toys.checkpoint(folder, lm, text=text, fusion=fusion, decoder=None)


def likelihoods(model: Model, memory: Tokens, image: int, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each of the ids [L] behind the first, [L - 1], word by word as generation reads them."""
    head, rows = model.objectives["lm"].head, torch.tensor([image])
    which = (FusedStepper, model) if model.decoder is None else (DecoderStepper, model.decoder)
    stepper = which[0](which[1], head, memory, rows, use_cache=False)
    logits = torch.cat([stepper.step(one[None, None]) for one in ids[:-1]])
    return F.log_softmax(logits, -1).gather(1, ids[1:, None])


@pytest.mark.parametrize(
    ("baseline", "writes"), [("others", "decoder"), ("greedy", "decoder"), ("others", "fusion"), ("greedy", "fusion")]
)
def test_gradient_is_the_definition(tmp_path: Path, baseline: str, writes: str) -> None:
    loaded = vlp.load(toy(tmp_path, writes))
    table = toys.caption_table(tmp_path)
    run = finetune_config(loaded, "toy", setting(table, 8, scst={}))
    adapted, lm = (
        run.task.adapt(run, loaded.config.objectives, CaptionSurvey("a", 1, 1)),
        loaded.config.objectives["lm"],
    )
    assert (adapted.objectives, adapted.model.decoder) == ({"lm": lm}, loaded.config.model.decoder)
    parts = parts_of(loaded, run.data)
    reader = open_data(run.data, "train")
    model = parts.model.eval().requires_grad_(True)
    known = {scored_id(decode_sample(reader[i]), run.data): decode_sample(reader[i]).texts for i in range(len(reader))}
    [(group, batch)] = batches(parts, read_samples(reader, run.data, {}), 8)
    batch = replace(batch, image_id=torch.tensor([scored_id(one.sample, run.data) for one in group]))
    scst = Scst(ScstConfig(samples=3, baseline=baseline, max_length=8), parts.tokenizer, "lm", known)
    drawn, told = scst(model, batch, Draw(3, 16, 1))
    again, _ = scst(model, batch, Draw(3, 16, 1))
    text = drawn.texts["causal"]
    assert torch.equal(text.ids, again.texts["causal"].ids)
    assert len(text.ids) == 24 and not torch.equal(text.ids, scst(model, batch, Draw(3, 24, 1))[0].texts["causal"].ids)
    loss = model.losses(drawn, Draw())["lm"].loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    df = document_frequencies([[tokenize(t) for t in texts] for texts in known.values()])
    total, rewards, baselines = 0.0, [], []
    for b, sample in enumerate(group):
        ids = [text.ids[row][text.keep[row]] for row in range(3 * b, 3 * b + 3)]
        reward = [score(parts.tokenizer.decode(one.tolist()), sample.sample.texts, df) for one in ids]
        if baseline == "greedy":
            how = run.task.generation.model_copy(update={"max_length": 8})
            task = run.task.model_copy(update={"generation": how})
            [said] = task.predict(replace(parts, model=model), _One(reader, b))
            base = [score(said["caption"], sample.sample.texts, df)] * 3
        else:
            base = [(sum(reward) - r) / 2 for r in reward]
        rewards, baselines = rewards + reward, baselines + base
        memory = model.run([Encode("image")], batch)[Encode("image")]
        for i, one in enumerate(ids):
            likely = likelihoods(model, memory, b, one)
            total = total - (reward[i] - base[i]) * likely.sum() / 3 / len(group)
    torch.testing.assert_close(loss, total, atol=1e-4, rtol=1e-4)
    assert told["lm/reward"].item() == pytest.approx(sum(rewards) / 24, abs=1e-5)
    assert told["lm/baseline"].item() == pytest.approx(sum(baselines) / 24, abs=1e-5)
    total.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-4, rtol=1e-3)


class _One:
    """One sample of a reader."""

    def __init__(self, reader: Reader, index: int) -> None:
        self.reader, self.index, self.fingerprint = reader, index, "one"

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> RawSample:
        return self.reader[self.index]


def test_captions_get_better_than_those_learned_from_words(tmp_path: Path) -> None:
    loaded = vlp.load(toys.checkpoint(tmp_path, ("lm",), fusion={"kind": "none"}))
    table = toys.caption_table(tmp_path)
    start = finetune(finetune_config(loaded, "toy", setting(table, 800)), loaded, tmp_path / "words", CPU)
    learned = vlp.load(tmp_path / "words")
    run = finetune_config(
        learned, "toy", setting(table, 320, scst={"max_length": 10}), {"train": {"optim": {"lr": 1e-4}}}
    )
    done = finetune(run, learned, tmp_path / "scst", CPU)
    assert done.before.metrics["CIDEr-D"] == pytest.approx(start.after.metrics["CIDEr-D"])
    assert done.after.metrics["CIDEr-D"] > done.before.metrics["CIDEr-D"] + 0.5
    logged = [record for record in read_metrics(tmp_path / "scst" / "metrics.jsonl") if "lm/reward" in record]
    assert logged and all(0 <= record["lm/reward"] <= 10 and 0 <= record["lm/baseline"] <= 10 for record in logged)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    table = toys.caption_table(tmp_path)
    with pytest.raises(ValueError, match="samples 1 has no others"):
        ScstConfig(samples=1)
    loaded = vlp.load(toys.checkpoint(tmp_path, ("itc", "itm")))
    with pytest.raises(ValueError, match=r"^task.scst improves on captions that a decoder .*$"):
        finetune(finetune_config(loaded, "toy", setting(table, 8, scst={})), loaded, tmp_path / "a", CPU)
    run = finetune_config(loaded, "toy", setting(table, 8, scst={}))
    with pytest.raises(
        ValueError, match=r"^task.scst .*writes by masks reads each word in a pass.*--objectives.lm '{}'$"
    ):
        settle_scst(run, {"seq2seq_mlm": Seq2SeqMlmConfig()})
    written = vlp.load(toys.checkpoint(tmp_path, ("lm",), fusion={"kind": "none"}))
    several = finetune_config(written, "toy", setting(table, 8, scst={}), {"data": {"texts_per_image": 2}})
    with pytest.raises(ValueError, match=r"^data.texts_per_image 2 with task.scst.*$"):
        finetune(several, written, tmp_path / "b", CPU)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    loaded = vlp.load(toys.checkpoint(tmp_path, ("lm",), fusion={"kind": "none"}))
    table = toys.caption_table(tmp_path)
    whole = setting(table, 32, scst={"max_length": 6})
    whole["train"] |= {"save_every": 16, "keep": 9}
    finetune(finetune_config(loaded, "toy", whole), loaded, tmp_path / "whole", CPU)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for path in (tmp_path / "stopped" / "checkpoints").iterdir():
        if int(path.name) > 16:
            shutil.rmtree(path)
    resume(tmp_path / "stopped", [], CPU)
    one, other = (
        load_file(find_checkpoint(tmp_path / name, newest=True) / "model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


def test_the_command_line_needs_no_more_than_to_be_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toys.checkpoint(tmp_path, ("lm",), fusion={"kind": "none"})
    start = ["finetune", "captioning", "--init", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "run")]
    data = ["--data", str(toys.caption_table(tmp_path)), "--data.split=0.25", "--data.workers=0", "--device=cpu"]
    handlers = logging.getLogger().handlers[:]
    try:
        assert main([*start, *data, "--train.samples=16", "--tune.probe=none", "--task.scst", "{}"]) == 0
    finally:
        logging.getLogger().handlers[:] = handlers
    said = capsys.readouterr().err
    assert "label_smoothing 0.1 is for given captions" in said and "micro_batch" in said
