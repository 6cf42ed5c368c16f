"""Two gloo processes give the gradients of one process that runs the same two groups as two micro-batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import exact_losses, split_batch, tiny_batch, tiny_model
from torch.nn.parallel import DistributedDataParallel

from encoders import GridConfig
from encoders.dictionary import DictionaryConfig
from objectives import ItcConfig, ItmConfig, MlmConfig
from vlp.train.optim import OptimConfig
from vlp.train.step import NonFiniteError, TrainStep

IDS = [0, 1, 2, 3, 0, 4, 5, 2]  # equal captions in different ranks' batches
EVEN, UNEVEN = (4, 4), (4, 3)
# A large epsilon: Adam would else blow up the rounding of gradients near zero.
CONFIG = OptimConfig(lr=1e-3, eps=1e-2, clip_norm=None)
TAUGHT = {"itc": ItcConfig(queue=12, distill=0.4, distill_ramp=12), "itm": ItmConfig(), "mlm": MlmConfig(distill=0.4)}
CASES = {
    "cross": ("dual_stream", ("itc", "itm", "mlm", "lm")),
    "single_stream": ("single_stream", ("itc", "itm", "mlm")),
    "none": ("none", ("itc",)),
    "sigmoid": ("none", ("sigmoid",)),
    "teacher": ("dual_stream", TAUGHT),
    "dictionary": ("single_stream", ("mlm",)),
}
GRIDS = {
    "dictionary": GridConfig(
        model="resnet10t",
        image_size=16,
        arguments={"output_stride": 8, "channels": (8, 8, 8, 8), "stem_width": 8},
        dictionary=DictionaryConfig(entries=12, width=8),
    )
}
STEPS = (EVEN, EVEN, UNEVEN)


def batches_of(step: int, sizes: tuple[int, ...]):
    whole = tiny_batch(sum(sizes), first=8 * step, ids=IDS[: sum(sizes)], seen=8 * step)
    return split_batch(whole, sizes)


def train(case: str, ranks: int, rank: int, pieces: int = 1):
    """Train on three steps of two groups; return the gradients of every step, the last report and the weights."""
    fusion, objectives = CASES[case]
    model = tiny_model(fusion, objectives, vision=GRIDS.get(case)).double().train()
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    step = TrainStep(wrapped, CONFIG, seed=3, total=24)
    found = []
    for number, sizes in enumerate(STEPS):
        groups = batches_of(number, sizes)
        if ranks > 1:
            groups = [with_counts(groups[rank], sizes)] if pieces == 1 else cut_again(groups, rank)
        report = step(groups)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    scalars = {name: value.item() for name, value in report.scalars.items()}
    return {"gradients": found, "scalars": scalars, "seen": report.seen, "weights": model.state_dict()}


def with_counts(batch, sizes):
    return replace(batch, counts=None if len(set(sizes)) == 1 else tuple((n, n) for n in sizes))


def cut_again(groups, rank):
    """Each rank runs its group as two micro-batches; their sizes differ between ranks."""
    cuts = [(3, group.num_images - 3) for group in groups] if groups[1].num_images == 4 else [(3, 1), (1, 2)]
    pieces = split_batch(groups[rank], cuts[rank])
    return [with_counts(piece, tuple(cut[index] for cut in cuts)) for index, piece in enumerate(pieces)]


def stop(rank: int):
    """One rank's gradient becomes nan; what each rank then says is returned."""
    model = tiny_model("none", ("itc", "mlm")).double()
    step = TrainStep(DistributedDataParallel(model), CONFIG, seed=3, total=24)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if rank == 1:
        model.objectives["mlm"].head.decoder.bias.register_hook(lambda gradient: gradient * float("nan"))
    try:
        step([tiny_batch(4, first=4 * rank)])
    except NonFiniteError as error:
        same = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        return {"message": str(error), "untouched": same, "images": error.batches[0].num_images}
    return {}


def statistics(*groups):
    """What the batch norms of a free CNN remember after a step on each group."""
    vision = GRIDS["dictionary"].model_copy(update={"dictionary": None, "freeze_norm": False})
    model = tiny_model("none", ("itc",), vision=vision).double().train()
    step = TrainStep(DistributedDataParallel(model) if dist.is_initialized() else model, CONFIG, seed=3, total=24)
    for group in groups:
        step([group])
    return {name: value for name, value in model.state_dict().items() if ".running_" in name}


TASKS = {
    **{case: lambda rank, case=case: train(case, 2, rank) for case in CASES},
    "accumulated": lambda rank: train("none", 2, rank, pieces=2),
    "statistics": lambda rank: statistics(batches_of(0, EVEN)[rank]),
    "stop": stop,
}


def work(rank: int, folder: str) -> None:
    """Run all tasks in this process, the rank ``rank`` of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with exact_losses():
            torch.save({name: task(rank) for name, task in TASKS.items()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks found in every task; started once, since starting takes longer than all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_same(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("task", [*CASES, "accumulated"])
def test_two_processes_equal_one_with_the_same_groups(ranks, task):
    """Even steps, repeated captions over ranks, and the uneven last batch; ``accumulated`` with both at once."""
    case = task if task in CASES else "none"
    with exact_losses():
        one = train(case, 1, 0)
    first, second = (found[task] for found in ranks)
    assert first["seen"] == second["seen"] == one["seen"] == 23
    assert first["scalars"] == second["scalars"] == pytest.approx(one["scalars"], rel=1e-5)
    for step in range(len(STEPS)):
        assert_same(first["gradients"][step], one["gradients"][step])
    assert_same(first["weights"], second["weights"])
    assert_same(first["weights"], one["weights"])


def test_ranks_share_the_statistics_of_batch_norms(ranks):
    """Each rank's are of its own images: else every rank would evaluate another model than the one that is saved."""
    first, second = (found["statistics"] for found in ranks)
    one, other = (statistics(group) for group in batches_of(0, EVEN))
    assert first and any(not torch.equal(one[name], other[name]) for name in one)
    assert_same(first, {name: (one[name] + other[name]) / 2 for name in one})
    assert_same(first, second)


def test_repeated_captions_matter():
    """The comparison above would notice ranks that do not know each other's captions."""
    with exact_losses():
        model = tiny_model("none", ("itc",)).double()
        losses = [model(tiny_batch(8, ids=ids), draw=None)[0].item() for ids in (IDS, range(8))]
    assert abs(losses[0] - losses[1]) > 1e-6


def test_all_ranks_stop_together(ranks):
    first, second = (found["stop"] for found in ranks)
    assert first["untouched"] and second["untouched"] and first["images"] == second["images"] == 4
    assert "the step at 0 samples: gradient is not finite; gradient norms: objectives.mlm.head" in first["message"]
    assert first["message"] == second["message"]
