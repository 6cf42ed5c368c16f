"""Pairs and texts alone in one step: micro-batches and gloo processes train the weights of one batch of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import exact_losses, split_batch, tiny_batch, tiny_model

from encoders.types import Batch
from objectives import ItcConfig, MlmConfig
from objectives.base import Draw
from vlp.model import Model
from vlp.train.accumulate import whole_step_objectives
from vlp.train.config import TrainConfig
from vlp.train.loop import wrap
from vlp.train.optim import OptimConfig
from vlp.train.step import TrainStep

OBJECTIVES = {
    "itc": ItcConfig(),
    "mlm": MlmConfig(source="main"),
    "mlm_text": MlmConfig(alone=True, source="text", head_of="mlm"),
}
CONFIG = TrainConfig(optim=OptimConfig(lr=1e-3, eps=1e-2, clip_norm=None))
STEPS = 3


def build() -> Model:
    return tiny_model("dual_stream", OBJECTIVES).double().train()


def batches_of(step: int, sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> list[Batch]:
    """Eight pairs and four texts, cut into these sizes."""
    pairs = replace(tiny_batch(8, first=8 * step, seen=12 * step), source="main")
    texts = split_batch(tiny_batch(4, first=100 + 4 * step, seen=12 * step), sizes[1])
    alone = [replace(one, images={}, image_id=None, source="text") for one in texts]
    return [*split_batch(pairs, sizes[0]), *alone]


def train(sizes: tuple[tuple[int, ...], tuple[int, ...]], own: slice | None = None) -> dict[str, torch.Tensor]:
    model = build()
    step = TrainStep(wrap(model, CONFIG, torch.device("cpu"), True), CONFIG.optim, seed=3, total=12 * STEPS)
    for number in range(STEPS):
        batches = batches_of(number, sizes)
        if own is not None:  # this rank's of each source
            pairs, texts = ([b for b in batches if b.source == name] for name in ("main", "text"))
            batches = pairs[own] + texts[own]
        report = step(batches)
        assert report.seen == 12 * (number + 1)
        assert {f"{name}/loss" for name in OBJECTIVES} <= report.scalars.keys()
    return dict(model.state_dict())


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_micro_batches_equal_whole_ones() -> None:
    with exact_losses():
        assert_same(train(((3, 2, 3), (1, 3))), train(((8,), (4,))))


def test_contrast_is_over_the_pairs_of_the_step() -> None:
    assert whole_step_objectives(build(), batches_of(0, ((4, 4), (2, 2)))) == {(0, 1): ["itc"]}
    assert whole_step_objectives(build(), batches_of(0, ((8,), (2, 2)))) == {}


def test_contrast_of_overlapping_sources_is_refused() -> None:
    model = tiny_model("none", {"itc": ItcConfig(), "itc_main": ItcConfig(source="main")})
    batches = [replace(tiny_batch(4), source=name) for name in ("main", "main", "more")]
    with pytest.raises(ValueError, match=r"\['itc', 'itc_main'\] are trained by sources of which some are the same"):
        whole_step_objectives(model, batches)


def test_every_parameter_gets_a_gradient_from_the_union() -> None:
    model = build()
    for batch in batches_of(0, ((8,), (4,))):
        model(batch, Draw(0))[0].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.objectives["mlm_text"].head is model.objectives["mlm"].head


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with exact_losses():
            torch.save(train(((2, 2, 2, 2), (2, 2)), slice(rank, None, 2)), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    with exact_losses():
        wanted = train(((8,), (4,)))
    for rank in range(2):
        assert_same(torch.load(folder / f"{rank}.pt"), wanted)
