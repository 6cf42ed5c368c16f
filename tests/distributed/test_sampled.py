"""One objective a step: two gloo processes train the weights of one that runs the same two groups."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import exact_losses, split_batch, tiny_batch, tiny_model

from objectives import ItmConfig, MlmConfig
from vlp.train.adversarial import AdversarialConfig
from vlp.train.config import TrainConfig
from vlp.train.loop import wrap
from vlp.train.optim import OptimConfig
from vlp.train.sample import sampled
from vlp.train.step import TrainStep

OBJECTIVES = {"itm": ItmConfig(), "mlm": MlmConfig()}
CONFIG = TrainConfig(sample={"itm": 1.0, "mlm": 1.0}, optim=OptimConfig(lr=1e-3, eps=1e-2, clip_norm=None))
STEPS = 5
NOISE = {"none": None, "noise": AdversarialConfig(modality="text", lr=0.1)}


def train(rank: int | None, noise: str) -> dict[str, torch.Tensor]:
    model = tiny_model("dual_stream", OBJECTIVES).double().train()
    wrapped = wrap(model, CONFIG, torch.device("cpu"), leaves_out=True)
    step = TrainStep(wrapped, CONFIG.optim, seed=3, total=8 * STEPS, adversarial=NOISE[noise])
    trained = []
    for number in range(STEPS):
        groups = split_batch(tiny_batch(8, first=8 * number, seen=8 * number), (4, 4))
        chosen = sampled(CONFIG.sample, 3, 8 * number)
        report = step(groups if rank is None else [groups[rank]], chosen)
        assert [name for name in OBJECTIVES if f"{name}/loss" in report.scalars] == chosen
        trained += chosen or []
    assert set(trained) == set(OBJECTIVES), "both are to be trained, in turns"
    return model.state_dict()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with exact_losses():
            torch.save({noise: train(rank, noise) for noise in NOISE}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    with exact_losses():
        wanted = {noise: train(None, noise) for noise in NOISE}
    name = "text.embeddings.word.weight"
    assert not torch.allclose(wanted["none"][name], wanted["noise"][name], rtol=1e-6)
    for rank in range(2):
        found = torch.load(folder / f"{rank}.pt")
        for noise, weights in wanted.items():
            for name, value in weights.items():
                torch.testing.assert_close(found[noise][name], value, rtol=1e-7, atol=1e-9)
