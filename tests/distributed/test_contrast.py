"""Contrast by tokens, within a modality, of views and with the nearest texts: two gloo processes equal one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import exact_losses, split_batch, tiny_batch, tiny_model

from objectives import (
    IntraConfig,
    ItcConfig,
    MultiviewItcConfig,
    NearestItcConfig,
    ObjectiveConfig,
    TokenItcConfig,
)
from objectives.base import Draw

CLEAN = {"images": ("clean",), "texts": ("clean",)}
OBJECTIVES: dict[str, dict[str, ObjectiveConfig]] = {
    "tokens": {"token_itc": TokenItcConfig()},
    "intra": {"itc": ItcConfig(), "intra": IntraConfig(queue=5, local=False)},
    "views": {"multiview_itc": MultiviewItcConfig(**CLEAN), "nearest_itc": NearestItcConfig(**CLEAN, queue=5)},
}
PARTS = ((4, 4), (3, 3))


def run(name: str, rank: int | None) -> dict[str, torch.Tensor]:
    """Losses, gradients and the queue of one rank of two, or of one process on all."""
    model = tiny_model("none", OBJECTIVES[name]).double()
    batch = tiny_batch(7, ("clean",), ids=(0, 1, 2, 3, 1, 4, 0))  # equal pairs on both ranks
    if rank is not None:
        batch = replace(split_batch(batch, [n for n, _ in PARTS])[rank], counts=PARTS)
        text = batch.texts["clean"]
        length = int(text.keep.sum(1).max())  # ranks' texts are padded to their own longest
        batch = replace(batch, texts={"clean": replace(text, ids=text.ids[:, :length], keep=text.keep[:, :length])})
    model.before_step()
    loss, _ = model(batch, Draw())
    loss.backward()
    found = {one: p.grad for one, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}
    if rank is not None:
        for value in found.values():
            dist.all_reduce(value)
            value /= 2
    model.after_step()
    return found | {one: value for one, value in model.named_buffers() if "queue" in one}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with exact_losses():
            torch.save({name: run(name, rank) for name in OBJECTIVES}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_equal_one(ranks, name: str) -> None:
    with exact_losses():
        wanted = run(name, None)
    assert name != "intra" or wanted["objectives.intra.queue.image_id"].tolist() == [4, 0, 2, 3, 1]
    for found in ranks:
        assert found[name].keys() == wanted.keys()
        for one, value in wanted.items():
            torch.testing.assert_close(found[name][one], value, rtol=1e-9, atol=1e-10, msg=lambda m, n=one: f"{n}: {m}")
