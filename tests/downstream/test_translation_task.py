"""Multimodal translation of what emoji show."""

import json
from pathlib import Path

import emojis
import numpy as np
import pytest
import torch
import toys
from emoji_pictures import picture, styles

import vlp
from downstream.evaluate import EvaluateConfig, parts_of, predict
from downstream.finetune import finetune, finetune_config
from downstream.metrics.translation import bleu4
from downstream.translation import TranslationConfig, read_targets, unwritable
from vlp.data.loader import DataConfig
from vlp.data.reader import BadSample, Sample, open_reader

pytest.importorskip("sacrebleu")

COLORS = {"red": "rotes", "blue": "blaues"}
SHAPES = {"heart": "herz", "square": "quadrat"}
SENTENCES = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
SENTENCES += [f"ein {color} {shape}" for color in COLORS.values() for shape in SHAPES.values()]


def table(folder: Path, name: str, number: int) -> Path:
    draw, rows = np.random.default_rng(number), []
    for i in range(number):
        color, shape = list(COLORS)[int(draw.integers(2))], list(SHAPES)[int(draw.integers(2))]
        image = picture(folder, styles(name == "test")[i % len(styles(name == "test"))], shape, color)
        target = f"ein {COLORS[color]} {SHAPES[shape]}"
        rows.append({"image": image, "source": f"a {color} {shape}", "target": [target, f"das {SHAPES[shape]}"]})
    return toys.write_table(folder / f"{name}.jsonl", rows)


def test_targets_are_one_or_several():
    assert read_targets(Sample("7", (), (), {"target": " ein Hund "}), "target") == ("ein Hund",)
    assert read_targets(Sample("7", (), (), {"de": ["a", "", "b"]}), "de") == ("a", "b")
    assert read_targets(Sample("7", (), (), {}), "target") == ()
    with pytest.raises(BadSample, match="something else than texts"):
        read_targets(Sample("7", (), (), {"target": 3}), "target")


def test_finetuning_learns_to_translate(tmp_path):
    loaded = emojis.checkpoint(tmp_path, SENTENCES, ("itm", "mlm"))
    rows = [json.loads(line) for line in table(tmp_path, "train", 24).read_text().splitlines()]
    rows = [row | {"target": row["target"][0]} for row in rows]
    data = {"train": str(toys.write_table(tmp_path / "one.jsonl", rows)), "val": str(table(tmp_path, "test", 12))}
    task = {"kind": "translation", "blank_images": True, "generation": {"method": "greedy", "max_length": 12}}
    train = {**emojis.TRAIN, "samples": 1280}
    settings = {"task": task, "data": data | {"workers": 0}, "train": train, **emojis.QUIET}
    done = finetune(finetune_config(loaded, "toy", settings), loaded, tmp_path / "run", torch.device("cpu"))
    assert done.before is None and "decoder over fused texts" in done.lacked
    found = done.after
    assert found.metrics["exact match"] >= 0.9 and found.floors["copy"]["exact match"] == 0.0
    assert set(found.floors) == {"copy", "most frequent", "blank images"}
    said = [row["translation"] for row in found.predictions]
    assert found.metrics["BLEU-4"] == bleu4(said, [row["targets"] for row in found.predictions])[0]
    assert "METEOR: not computed, German needs its jar; name it with --task.meteor-jar" in found.notes
    assert any("sacrebleu nrefs:2" in note for note in found.notes)
    mine = EvaluateConfig(task=TranslationConfig(**task), data=DataConfig(val=data["val"], max_length=24))
    assert predict(mine, vlp.load(tmp_path / "run"), tmp_path / "out.jsonl") == 12
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["translation"] for row in rows] == said and "targets" not in rows[0]


def test_what_cannot_be_written_is_counted(tmp_path):
    loaded = emojis.checkpoint(tmp_path, SENTENCES, ("itm", "mlm"))
    assert unwritable(loaded.tokenizer, [["Ein rotes Herz."]]) == 0.0
    assert unwritable(loaded.tokenizer, [["rotes herz"], ["ein 猫 龍"]]) == pytest.approx(2 / 5)


def test_data_without_translations_and_models_without_decoder(tmp_path):
    loaded = emojis.checkpoint(tmp_path, SENTENCES, ("itm", "mlm"))
    task, path = TranslationConfig(target="fr"), table(tmp_path, "test", 2)
    reader = open_reader(str(path), text="source")
    with pytest.raises(ValueError, match="no fr; name the field of the translations"):
        task.survey(reader, task.settings(DataConfig()))
    parts = parts_of(loaded, task.settings(loaded.config.data))
    with pytest.raises(ValueError, match="lacks a decoder over fused texts"):
        TranslationConfig().evaluate(parts, reader)
