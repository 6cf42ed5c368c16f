"""Batch, duration and learning rate of a finetuning, chosen from the data, the model and the memory that there is.

Rules of thumb, each said with its reason; what a recipe or flag states is left alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from downstream.task import gather
from objectives.base import Draw
from objectives.collectives import world_size
from vlp.data.fetch import Prepare
from vlp.run import Parts
from vlp.train.config import TrainConfig
from vlp.train.lora import count_trained
from vlp.train.optim import freeze_parts
from vlp.train.reading import open_loader
from vlp.train.step import Rewrite

logger = logging.getLogger(__name__)

Chosen = Literal["global_batch", "samples", "lr", "warmup", "micro_batch"]
ALL: tuple[Chosen, ...] = ("global_batch", "samples", "lr", "warmup", "micro_batch")

STEPS = 16
"""Steps that an epoch should have at least."""
SMALLEST, LARGEST = 8, 256
"""Bounds of the batch."""
EPOCHS, MOST_EPOCHS, FEWEST_STEPS = 10, 50, 500
"""Passes over the data: more where they are so few that the run would be shorter than these steps."""
RATE, PARAMETERS, BATCH = 1e-3, 4e6, 64
"""Learning rate of a model with so many trainable parameters at this batch: demo-sized ones want 1e-3, those of 200
million 2e-5 (BLIP 1e-5, ALBEF 2e-5, ViLT 1e-4, at batch 256)."""
RATES = (1e-5, 1e-3)
MEASURED = 4
"""Samples whose activations are measured."""
SPARE = 0.6
"""Share of the free memory that a step may take: what is measured lacks the allocator's and the kernels' own needs."""


@dataclass(frozen=True)
class Measured:
    """What the choice follows from."""

    samples: int
    """Of an epoch."""
    trainable: int
    """Parameters that are trained."""
    activations: int
    """Bytes that a sample keeps for its gradient; 0 where it was not asked for."""
    free: int
    """Bytes that there are on this rank's device."""


def choose_training(
    parts: Parts, auto: Collection[Chosen], prepare: Prepare, rewrite: Rewrite | None = None
) -> TrainConfig:
    """Return the run's training settings with those named in ``auto`` chosen, and say each with its reason.

    Args:
        parts: the assembled run, its model on the device where it is trained.
        auto: what is to be chosen.
        prepare: sample -> example, for the activations to be measured on the data.
        rewrite: what trains in place of a micro-batch, if anything does.
    """
    config = parts.run.train
    if not auto:
        return config
    measured = measure(parts, prepare, activations="micro_batch" in auto, rewrite=rewrite)
    values, reasons = choose(config, auto, measured)
    for name, reason in reasons.items():
        logger.info("%s %s: %s", name, f"{values[name]:,}" if isinstance(values[name], int) else values[name], reason)
    optim: dict[str, Any] = {name: values.pop(name) for name in ("lr", "warmup") if name in values}
    return config.model_copy(update={**values, "optim": config.optim.model_copy(update=optim)})


def choose(config: TrainConfig, auto: Collection[Chosen], measured: Measured) -> tuple[dict[str, Any], dict[str, str]]:
    """Return values and reasons of the settings in ``auto``, each following from those before it."""
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    n, world = measured.samples, world_size()
    batch, samples, rate = config.global_batch, config.samples, config.optim.lr
    if "global_batch" in auto:
        batch = max(_power_of_two(min(max(n // STEPS, SMALLEST), LARGEST)), world)
        values["global_batch"] = batch
        reasons["global_batch"] = f"an epoch of {n:,} samples then has {-(-n // batch)} steps"
    if "samples" in auto:
        samples = max(EPOCHS * n, min(FEWEST_STEPS * batch, MOST_EPOCHS * n))
        values["samples"] = samples
        reasons["samples"] = f"{samples / n:.3g} epochs, {-(-samples // batch):,} steps"
    if "lr" in auto:
        rate = RATE * (PARAMETERS / max(measured.trainable, 1)) * (batch / BATCH) ** 0.5
        rate = float(f"{min(max(rate, RATES[0]), RATES[1]):.1g}")
        values["lr"] = rate
        reasons["lr"] = f"for {measured.trainable / 1e6:.3g} million trainable parameters at batch {batch}"
    if "warmup" in auto:
        values["warmup"] = samples // 20
        reasons["warmup"] = "a twentieth of the run"
    if "micro_batch" in auto:
        share = -(-batch // world)
        values["micro_batch"], reasons["micro_batch"] = _micro_batch(share, measured)
    return values, reasons


def _micro_batch(share: int, measured: Measured) -> tuple[int, str]:
    """The largest part of a rank's share of the batch whose activations fit, and why."""
    fixed = 12 * measured.trainable  # gradient and two moments, all float32
    room = int(SPARE * measured.free) - fixed
    fits = max(room // max(measured.activations, 1), 1)
    micro = share if fits >= share else _power_of_two(fits)
    reason = (
        f"a sample keeps {_size(measured.activations)} for its gradient, the optimizer takes {_size(fixed)}, and "
        f"{_size(measured.free)} are free"
    )
    return micro, reason


def measure(parts: Parts, prepare: Prepare, *, activations: bool = True, rewrite: Rewrite | None = None) -> Measured:
    """Count samples and parameters, and the bytes that a sample's forward pass keeps; the same on all ranks.

    Where there are several sources of data, the bytes are those of the source that keeps most.
    """
    model, config, world = parts.model, parts.run.train, world_size()
    freeze_parts(model, config.optim)
    trainable = sum(one.numel() for one in model.parameters() if one.requires_grad)
    if config.lora is not None:
        trainable = count_trained(model, config.lora)
    # A micro-batch is of one source: of each, as many samples are measured, whatever share of a step it has.
    data, number = parts.run.data, MEASURED * world * (1 + len(parts.sources))
    sources = {name: one.model_copy(update={"ratio": 1.0, "hash": None}) for name, one in data.sources.items()}
    alike = {"workers": 0, "hash": None, "mix": "joint", "ratio": 1.0, "sources": sources}
    few = config.model_copy(update={"global_batch": number, "micro_batch": MEASURED})
    here = parts.run.model_copy(update={"train": few, "data": data.model_copy(update=alike)})
    level = logging.getLogger("vlp.train.reading").level
    logging.getLogger("vlp.train.reading").setLevel(logging.WARNING)  # these sizes are nobody's
    try:
        loader = open_loader(replace(parts, run=here), prepare)
    finally:
        logging.getLogger("vlp.train.reading").setLevel(level)
    kept = 0
    if activations:
        for each in next(loader.steps(0, number)):
            batch = each.to(model.device)
            if rewrite is not None:
                batch, _ = rewrite(model, batch, Draw(config.seed))
            kept = max(kept, kept_bytes(parts, batch) // MEASURED)
    free = min(gather([free_memory(model.device)]))
    return Measured(loader.order.size, trainable, max(gather([kept])), free)


def kept_bytes(parts: Parts, batch: Any) -> int:
    """Return the bytes of the tensors that a forward pass keeps for the backward pass, weights left out."""
    model = parts.model
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    bf16 = model.device.type == "cuda" and parts.run.train.precision != "fp32"
    was_training = model.training
    model.eval()  # no running statistics are touched
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.autocast(model.device.type, torch.bfloat16, enabled=bf16),
            saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            loss, _ = model(batch, Draw(parts.run.train.seed, 0, 0))
    finally:
        model.train(was_training)
    del loss
    return sum(found.values())


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device; for the CPU those of the machine, or of its share of a container."""
    if device.type == "cuda":  # what torch holds in reserve, since an evaluation say, it can use again
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    found = [_meminfo(), _container()]
    known = [one for one in found if one is not None]
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(known) if known else pages // 2  # no /proc: half of what the machine has


def _meminfo() -> int | None:
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _container() -> int | None:
    """What a control group leaves of its limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return None if limit == "max" else max(int(limit) - int(used), 0)
    except (OSError, ValueError):
        return None


def _power_of_two(number: int) -> int:
    return 1 << (max(number, 1).bit_length() - 1)


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"


def given(flags: Collection[str]) -> set[str]:
    """Return which of these settings command-line flags state."""
    names = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in flags if word.startswith("--")}
    paths: Mapping[str, str] = {
        name: f"train.optim.{name}" if name in ("lr", "warmup") else f"train.{name}" for name in ALL
    }
    return {name for name, path in paths.items() if path in names}
