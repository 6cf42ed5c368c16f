"""ITM with candidates of all ranks: two gloo processes give the loss and gradients of one on the joined batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import SIZES, exact_losses, split_batch, tiny_batch, tiny_model

from objectives import ItcConfig, ItmConfig
from objectives.base import Replay
from vlp.fusion.dual import DualStreamConfig
from vlp.fusion.multiway import MultiwayConfig

FUSIONS = {
    "cross": DualStreamConfig(**SIZES),
    "multiway": MultiwayConfig(**SIZES, decoupled=True, sub_norm=True),
}
OBJECTIVES = {"itc": ItcConfig(), "itm": ItmConfig(candidates="global", exclude="diagonal")}
IMAGE, TEXT = torch.tensor([1, 6, 0, 4, 2, 0, 3]), torch.tensor([5, 0, 4, 1, 6, 2, 0])
"""False image of each text and false text of each image, most of them of the other rank."""
PARTS = ((4, 4), (3, 3))


def run(fusion: str, rank: int | None) -> dict[str, torch.Tensor]:
    """Losses and gradients of one rank of two, or of one process on all."""
    model = tiny_model(FUSIONS[fusion], OBJECTIVES).double()
    batch, rows = tiny_batch(7, ("clean",)), slice(None)
    if rank is not None:
        first = sum(n for n, _ in PARTS[:rank])
        rows = slice(first, first + PARTS[rank][0])
        batch = replace(split_batch(batch, [n for n, _ in PARTS])[rank], counts=PARTS)
        text = batch.texts["clean"]
        length = int(text.keep.sum(1).max())  # ranks' texts are padded to their own longest
        batch = replace(batch, texts={"clean": replace(text, ids=text.ids[:, :length], keep=text.keep[:, :length])})
    loss, _ = model(batch, Replay({"itm.image": IMAGE[rows], "itm.text": TEXT[rows]}))
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {"loss": loss.detach()}
    if rank is not None:
        for value in found.values():
            dist.all_reduce(value)
            value /= 2
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with exact_losses():
            torch.save({fusion: run(fusion, rank) for fusion in FUSIONS}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_two_processes_equal_one(ranks, fusion: str) -> None:
    with exact_losses():
        wanted = run(fusion, None)
    for found in ranks:
        assert found[fusion].keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                found[fusion][name], value, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
