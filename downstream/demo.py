"""`vlp demo`: the whole path on data that ship with the package, ending in one table and one page.

Pretrain on emoji of two drawing styles; search among emoji of a third, never seen; finetune question answering on
easy-vqa and captioning on the emoji; write report.html.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

import vlp
from downstream import AnyTask
from downstream.evaluate import EvaluateConfig, evaluate, versions
from downstream.finetune import FinetuneConfig, checkpoint_layer, finetune
from downstream.report import Caption, Hit, Query, Question, Report, Row, curves_from_metrics
from downstream.retrieval import ITC, ITM, SUM, RetrievalConfig
from downstream.task import Result
from objectives.base import Objective
from vlp.config import Config, Layer, build, load_recipe
from vlp.data.benchmark import emoji_split_hash
from vlp.data.loader import DataConfig
from vlp.data.reader import Reader, decode_sample, open_reader
from vlp.loaded import Loaded
from vlp.pretrain import pretrain
from vlp.run import RunConfig
from vlp.train.health import chance_levels

logger = logging.getLogger(__name__)

UNSEEN_STYLE = "emoji:fluent3d"
CELLS = {
    "seen concepts, unseen style": (UNSEEN_STYLE, "train"),
    "unseen concepts, unseen style": (UNSEEN_STYLE, "test"),
    "seen concepts, training style": ("emoji:noto", "train"),
}
"""Galleries by what was seen in training: data, and the split of the concepts."""
SPLITS = {
    "seen concepts, unseen style": "fluent3d, a style never seen in training, of the 1,106 concepts that were.",
    "unseen concepts, unseen style": "fluent3d, of 328 concepts that were never seen in any style.",
    "seen concepts, training style": "noto, one of the two styles trained on.",
    "easy-vqa test": "the official test split: one coloured shape an image, 13 answers.",
}
SHOWN = 8
"""Examples of each kind in the report."""


class DemoConfig(Config):
    """Budgets of the demo, in samples."""

    recipe: str = "demo"
    """Pretraining recipe."""
    pretrain: int = Field(default=100_000, ge=256)
    """Samples of pretraining; the recipe's ramps are stretched with it."""
    vqa: int = Field(default=16_000, ge=0)
    """Samples of VQA finetuning, images with eight questions each; 0 = leave VQA out."""
    captioning: int = Field(default=40_000, ge=0)
    """Samples of captioning finetuning, 0 = leave captioning out."""
    seed: int = 0
    """Of initial weights, data order, masks and negatives."""
    smoke: bool = False
    """The same path in about a minute; its numbers mean nothing."""

    def budgets(self) -> DemoConfig:
        """Return the config with the smoke test's budgets where that is asked for."""
        if not self.smoke:
            return self
        return self.model_copy(update={"pretrain": 2048, "vqa": 256, "captioning": 1024})


def demo(config: DemoConfig, folder: Path, device: torch.device, *, command: str = "") -> Report:
    """Run the demo in ``folder``; return what ``report.html`` shows.

    Raises:
        ValueError: the folder holds a demo already, or easy-vqa (extra `demo`) is not installed.
    """
    config = config.budgets()
    cells = {name: cell for name, cell in CELLS.items() if cell[1] == "test" or not config.smoke}
    open_reader("easy-vqa:test") if config.vqa else None  # a missing extra is said before minutes of training
    start = time.perf_counter()
    run = pretraining(config)
    outcome = pretrain(run, folder / "pretrain", device, command=command)
    if not outcome.finished:
        raise KeyboardInterrupt  # a signal ended it; what was trained is saved
    trained = time.perf_counter()
    loaded = vlp.load(str(outcome.checkpoint), device=str(device))
    results: dict[str, Result] = {
        name: search(loaded, spec, split, folder / "retrieval" / name.replace(", ", "_").replace(" ", "_"))
        for name, (spec, split) in cells.items()
    }
    rows = [row for name, result in results.items() for row in retrieval_rows(name, result)]
    queries = {name: gallery(results[name], *cells[name]) for name in cells if "unseen style" in name}
    questions: list[Question] = []
    captions: list[Caption] = []
    if config.vqa:
        result = tune(config, loaded, outcome.checkpoint, "vqa", folder, device, command)
        rows += task_rows("VQA", "easy-vqa test", result, {"accuracy": "of test questions are answered right"})
        questions = question_examples(result, open_reader("easy-vqa:test"))
    if config.captioning:
        result = tune(config, loaded, outcome.checkpoint, "captioning", folder, device, command)
        metrics = {"CIDEr-D": "", "BLEU-4": "", "exact match": "of emoji in a style never seen get exactly their name"}
        rows += task_rows("Captioning", "seen concepts, unseen style", result, metrics)
        captions = caption_examples(result, open_reader(UNSEEN_STYLE, where={"split": "train"}))
    end = time.perf_counter()
    objectives = {name: one for name, one in loaded.model.objectives.items() if isinstance(one, Objective)}
    chances = chance_levels(objectives, run.train.global_batch)
    return Report(
        title="vlp demo",
        lead=lead(loaded),
        facts=facts(config, run, trained - start, end - start, command),
        rows=rows,
        splits=SPLITS,
        curves=curves_from_metrics(folder / "pretrain" / "metrics.jsonl", chances),
        queries=queries,
        questions=questions,
        captions=captions,
        notes=notes(results.values(), config.smoke),
    )


def lead(loaded: Loaded) -> str:
    """Return what the report is about, in a paragraph."""
    million = sum(p.numel() for p in loaded.model.parameters()) / 1e6
    return (
        f"A model of {million:.1f} million parameters learned from emoji in two drawing styles and their names. "
        "It looks for emoji by name, and for names by emoji, in a third style that it never saw; "
        "it learns to answer questions about coloured shapes, and to write the names."
    )


def pretraining(config: DemoConfig) -> RunConfig:
    """Return the pretraining run: the recipe, its durations stretched to the budget."""
    layers = load_recipe(config.recipe, group="pretrain")
    recipe = build(RunConfig, *layers)
    stretch = config.pretrain / recipe.train.samples
    tree: dict[str, Any] = {
        "train": {
            "samples": config.pretrain,
            "seed": config.seed,
            "optim": {"warmup": round(recipe.train.optim.warmup * stretch)},
        },
        "objectives": {
            name: {field: round(getattr(one, field) * stretch) for field in ("random_until", "hard_from")}
            for name, one in recipe.objectives.items()
            if one.kind == "itm"
        },
    }
    return build(RunConfig, *layers, Layer(tree, "demo"))


def search(loaded: Loaded, spec: str, split: str, folder: Path) -> Result:
    """Score retrieval on one gallery; the weight of ITC beside ITM is chosen on the val concepts in the same style.

    These are sought among the train concepts, too: a weight that is right among 147 may be wrong among 1,106.
    """
    task = RetrievalConfig(weight_data=spec, weight_where={"split": "val"}, weight_among={"split": ["train", "val"]})
    return score(loaded, task, {"val": spec, "where": {"split": split}}, folder)


def score(loaded: Loaded, task: AnyTask, data: Mapping[str, Any], folder: Path) -> Result:
    """Evaluate a task on some data, read as the checkpoint's were."""
    mine: DataConfig = loaded.config.data.model_copy(update={"train": None, **data})
    return evaluate(EvaluateConfig(task=task, checkpoint="demo", data=mine), loaded, folder)


def tune(
    config: DemoConfig, loaded: Loaded, checkpoint: Path, task: str, folder: Path, device: torch.device, command: str
) -> Result:
    """Finetune by the recipe `finetune/demo_TASK`; return the score after.

    Captions stand beside those of the training images that the pretrained model itself holds for most alike.
    """
    samples = config.vqa if task == "vqa" else config.captioning
    layers = load_recipe(f"demo_{task}", group="finetune")
    base = checkpoint_layer(loaded.config)
    recipe = build(FinetuneConfig, base, *layers)
    warmup = round(recipe.train.optim.warmup * samples / recipe.train.samples)
    settings: dict[str, Any] = {
        "init": str(checkpoint),
        "train": {"samples": samples, "seed": config.seed, "optim": {"warmup": warmup}},
    }
    if task == "captioning" and loaded.model.space() is not None:
        settings["task"] = {"neighbours_by": str(checkpoint)}
    run = build(FinetuneConfig, base, *layers, Layer(settings, "demo"))
    done = finetune(run, loaded, folder / task, device, command=command)
    if done.after is None:
        raise KeyboardInterrupt  # a signal ended it; what was trained is saved
    return done.after


def retrieval_rows(cell: str, result: Result) -> list[Row]:
    """Rows of one gallery: both directions, each scoring, R@1, 5, 10 beside chance."""
    found = []
    for direction, name in (("t2i", "text to image"), ("i2t", "image to text")):
        for scoring in (ITC, ITM, SUM):
            for k in (1, 5, 10):
                key = f"{scoring}/{direction}/R@{k}"
                if key not in result.metrics:
                    continue
                floor = {"chance": result.floors["chance"][key]}
                first = direction == "t2i" and scoring == ITC and k == 1 and cell == next(iter(CELLS))
                said = "of emoji in a style never seen are found first by their name" if first else ""
                found.append(
                    Row(f"Retrieval, {name}", cell, f"R@{k}", result.metrics[key], floor, method=scoring, headline=said)
                )
    return found


def task_rows(task: str, split: str, result: Result, metrics: Mapping[str, str]) -> list[Row]:
    """One row a metric, beside the floors that have it; ``metrics``: name -> headline or nothing."""
    return [
        Row(
            task,
            split,
            metric,
            result.metrics[metric],
            {name: floor[metric] for name, floor in result.floors.items() if metric in floor},
            kind="plain" if metric == "CIDEr-D" else "percent",
            headline=headline,
        )
        for metric, headline in metrics.items()
    ]


def facts(config: DemoConfig, run: RunConfig, trained: float, whole: float, command: str) -> list[tuple[str, str]]:
    """What a number must be read with."""
    return [
        ("command", command),
        ("pretraining", f"{config.pretrain:,} samples in {trained:.0f} s"),
        ("whole demo", f"{whole:.0f} s"),
        ("objectives", ", ".join(run.objectives)),
        ("fusion", run.model.fusion.kind),
        ("seed", str(config.seed)),
        ("split", f"sha256 {emoji_split_hash()[:16]}"),
        ("machine", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"),
        *versions().items(),
    ]


def notes(results: Iterable[Result], smoke: bool) -> list[str]:
    """Sentences to read the numbers by."""
    found = list(dict.fromkeys(note for result in results for note in result.notes))
    return [*(["a smoke test: these numbers mean nothing"] if smoke else []), *found]


def images_of(reader: Reader, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Return the first image of every wanted key, uint8 [3, H, W]."""
    keys, found = set(wanted), dict[str, Tensor]()
    for index in range(len(reader)):
        raw = reader[index]
        if raw.key in keys and raw.key not in found:
            found[raw.key] = decode_sample(raw, need_text=False).images[0]
    return found


def spread(items: Sequence[Any], number: int = SHOWN) -> list[Any]:
    """Return ``number`` items at even distances: examples that nobody picked."""
    step = max(1, len(items) // number)
    return list(items[::step][:number])


def gallery(result: Result, spec: str, split: str) -> list[Query]:
    """Text queries with the images found for them."""
    rows = spread([row for row in result.predictions if row["direction"] == "t2i"])
    shown = images_of(
        open_reader(spec, where={"split": split}),
        {key_of(key) for row in rows for key in [*row["found"], *row["true"]]},
    )
    names = {row["image"]: row["text"] for row in result.predictions if row["direction"] == "t2i"}
    queries = []
    for row in rows:
        hits = [
            Hit(shown[key_of(key)], names.get(key, ""), score, key in row["true"])
            for key, score in zip(row["found"][:5], row["scores"][:5], strict=True)
        ]
        queries.append(Query(row["text"], shown[key_of(row["true"][0])], hits, list(row["ranks"].values())[-1]))
    return queries


def key_of(image: str) -> str:
    """Return a sample's key from an image's name, which may begin with its source."""
    return image.rsplit(":", 1)[-1]


def question_examples(result: Result, reader: Reader) -> list[Question]:
    """Some questions with the model's answers."""
    rows = spread(result.predictions)
    shown = images_of(reader, {row["key"] for row in rows})
    return [
        Question(
            shown[row["key"]],
            row["question"],
            row["answers"][0],
            row["answer"],
            row["accuracy"] == 1.0,
            row["probability"],
        )
        for row in rows
    ]


def caption_examples(result: Result, reader: Reader) -> list[Caption]:
    """Some captions beside their references."""
    rows = spread(result.predictions)
    shown = images_of(reader, {row["key"] for row in rows})
    return [Caption(shown[row["key"]], row["caption"], row["references"]) for row in rows]
