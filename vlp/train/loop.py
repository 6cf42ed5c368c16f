"""The training loop: steps of samples, a log, checkpoints, and a clean end on a signal."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from encoders.region import RegionEncoder
from objectives.base import AGAIN, Objective
from objectives.collectives import rank, sum_no_grad, world_size
from objectives.mrm import Mrm
from vlp.config import Config
from vlp.data.fetch import Prepare, pair_example
from vlp.data.loader import Loader
from vlp.data.regions import NAMES, RegionLayout
from vlp.model import Model
from vlp.train.adversarial import AdversarialConfig
from vlp.train.health import Watch, chance_levels
from vlp.train.log import RunLog
from vlp.train.optim import OptimConfig, freeze_parts
from vlp.train.sample import check_sample, sampled
from vlp.train.state import TrainState, write_config
from vlp.train.step import NonFiniteError, Precision, StepReport, TrainStep

if TYPE_CHECKING:
    from vlp.run import Parts

logger = logging.getLogger(__name__)


class TrainConfig(Config):
    """How the model is trained. Durations are in samples, over all ranks."""

    samples: int = Field(1_000_000, ge=1)
    """Samples to train on, all passes over the data counted."""
    global_batch: int = Field(256, ge=1)
    """Samples of one optimizer step, over all ranks and accumulation."""
    micro_batch: int = Field(256, ge=1)
    """Largest batch that one rank runs at a time; the rest of its share is accumulated, exactly also for ITC."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    precision: Precision = "auto"
    """`auto`: bf16 autocast on CUDA, fp32 elsewhere."""
    compile: bool = False
    """torch.compile the encoders and the fusion (GPU)."""
    sample: dict[str, float] = Field(default_factory=dict)
    """Each step trains one of these, drawn by their ratios: an objective, or several joined by `+` (UNITER: `mlm: 12`,
    `itm+wra: 9`); empty = every step trains all objectives."""
    adversarial: AdversarialConfig | None = None
    """Noise on words or regions that raises the loss (VILLA); none = no noise."""
    seed: int = 0
    """Of initial weights, data order, masks and negatives."""
    save_every: int | None = None
    """Samples between checkpoints; None = only at the end and when interrupted."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept, newest first."""
    log_every: int = Field(10, ge=1)
    """Steps between two records of the log."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    checkpoint: Path
    """The last checkpoint."""
    seen: int
    """Samples seen."""
    finished: bool
    """Whether all samples were seen (else a signal ended it)."""


def micro_batches(config: TrainConfig, world: int) -> int:
    """Return into how many micro-batches each rank cuts its share of a step.

    Raises:
        ValueError: the global batch has fewer samples than there are ranks.
    """
    if config.global_batch < world:
        raise ValueError(
            f"train.global_batch {config.global_batch} is less than the {world} ranks; raise it or use fewer"
        )
    share = -(-config.global_batch // world)
    return -(-share // config.micro_batch)


def train(
    parts: Parts,
    folder: Path,
    device: torch.device,
    *,
    prepare: Prepare = pair_example,
    command: str = "",
    seen: int = 0,
    restored: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train ``parts.model`` in place on ``parts.reader``.

    Args:
        parts: the assembled run; its model on any device.
        folder: the run's: log, checkpoints.
        device: of this rank.
        prepare: sample -> example (a finetuning task gives its own).
        command: for the model card.
        seen: samples that the run had seen at its checkpoint.
        restored: the training state of that checkpoint.

    Raises:
        ValueError: the data are unusable.
        NonFiniteError: a loss or gradient was not finite; nothing was updated, the batch lies in the folder.
    """
    config = parts.run.train
    check_sample(config.sample, dict(parts.model.objectives.items()))  # type: ignore[arg-type]
    freeze_parts(parts.model, config.optim)
    model = wrap(parts.model.to(device).train(), config, device)
    loader = open_loader(parts, prepare)
    if config.compile and config.adversarial:
        raise ValueError("train.adversarial changes what parts of the model read, which train.compile fixes; set one")
    more = {"precision": config.precision, "adversarial": config.adversarial}
    step = TrainStep(model, config.optim, seed=config.seed, total=config.samples, **more)  # type: ignore[arg-type]
    state = TrainState(folder, parts, step, command, keep=config.keep)
    meter = Meter(device)
    if restored is not None:
        state.restore(restored)
        meter.restore(restored["meter"])
    watch = watch_over(parts)
    if rank() == 0:
        write_config(folder, parts.run)  # only now: all that can be wrong with it has been said
    log = RunLog(folder, config.samples, seen, watch.chances, quiet=rank() != 0)
    try:
        with stop_signal() as stop:
            for batches in timed(loader.steps(seen, config.samples), meter):
                meter.add(report := step(batches, sampled(config.sample, config.seed, batches[0].seen)))
                seen = report.seen
                last = config.samples - seen < world_size()  # a step needs a sample per rank
                if meter.steps >= config.log_every or last:
                    tell(meter.record(), log, watch)
                due = config.save_every is not None and seen // config.save_every > report.started // config.save_every
                stopping = agreed(stop.is_set())
                if due or last or stopping:
                    state.save(seen, meter.latest, meter.state())
                if stopping and not last:
                    logger.warning("stopped by a signal at %d samples; go on with --resume %s", seen, folder)
                    break
    except NonFiniteError as error:
        path = state.keep_batch(error)
        raise NonFiniteError(f"{error}; the batch is in {path}", error.batches) from error
    finally:
        log.close()
    loader.report_bad()
    return Outcome(state.latest, seen, config.samples - seen < world_size())


def tell(record: Mapping[str, Any], log: RunLog, watch: Watch) -> None:
    """Write a record, and say in words what it shows."""
    log.write(record)
    for sentence in watch.look(record["seen"], losses_of(record), record["wait_share"]):
        logger.warning(sentence)


def open_loader(parts: Parts, prepare: Prepare) -> Loader:
    """Return this rank's loader of the training data.

    Raises:
        ValueError: the global batch has fewer samples than there are ranks.
    """
    config, world = parts.run.train, world_size()
    number = micro_batches(config, world)
    sizes = (config.global_batch, world, number, config.micro_batch)
    logger.info("global batch %d = %d ranks x %d micro-batches x up to %d", *sizes)
    assert parts.reader is not None
    return Loader(
        parts.reader,
        prepare,
        parts.tokenizer,
        parts.model.text_views(),
        parts.run.data,
        seed=config.seed,
        global_batch=config.global_batch,
        micro_batches=number,
        rank=rank(),
        world=world,
        again=AGAIN in parts.model.image_names(),
        image_views=parts.model.image_views(),
        regions=region_layout(parts.model, parts.run.data.whole_region),
    )


def region_layout(model: Model, whole: bool) -> RegionLayout | None:
    """Return what a model reads of a detector's regions; None if it reads pixels.

    Raises:
        ValueError: two objectives hide regions in different ways.
    """
    if not isinstance(model.vision, RegionEncoder):
        return None
    config, predicting = model.vision.config, [one for one in model.objectives.values() if isinstance(one, Mrm)]
    if len(found := {one.view for one in predicting}) > 1:
        raise ValueError(
            f"objectives {[one.name for one in predicting]} hide regions in different ways; give them the same "
            "mask_probability, hide, swap and overlap"
        )
    hide = next(iter(found), None)
    targets = dict.fromkeys(name for one in predicting for name in one.reads if name in NAMES and name != "features")
    views = {name: hide if name == "masked" else None for name in sorted(model.image_names() - {"clean"})}
    return RegionLayout(config.boxes, config.number, whole, tuple(targets), views)


def watch_over(parts: Parts) -> Watch:
    """Return the watch of a run's losses, and say their chance levels."""
    config = parts.run.train
    objectives = {name: one for name, one in parts.model.objectives.items() if isinstance(one, Objective)}
    chances = chance_levels(objectives, config.global_batch)
    logger.info("chance levels: %s", ", ".join(f"{name} {level:.3f}" for name, level in chances.items()))
    return Watch(chances, patience=max(config.samples // 5, 20 * config.global_batch))


def wrap(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """Compile and distribute the model where the run asks for it."""
    if config.compile:
        for part in ("vision", "text", "fusion"):
            if isinstance(module := getattr(model, part), nn.Module):
                module.compile()
    if world_size() == 1:
        return model
    # Buffers are constants, or equal on all ranks because what fills them is gathered: there is nothing to broadcast.
    device_ids = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=device_ids,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=bool(config.sample),  # the heads of objectives that a step leaves out
    )


class Meter:
    """Sums what steps report, on the device, until it is written."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.latest = device, dict[str, Any]()
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.steps, self.samples, self.waited, self.start = 0, 0, 0.0, time.perf_counter()

    def add(self, report: StepReport) -> None:
        """Add one step."""
        for name, value in report.scalars.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1  # a sampled objective has fewer than steps
        self.steps += 1
        self.samples += report.seen - report.started
        self.seen, self.rate = report.seen, report.lr

    def state(self) -> dict[str, Any]:
        """Return what is summed and not yet written, so that a resumed run writes the records it would have written."""
        return {"sums": dict(self.sums), "counts": dict(self.counts), "steps": self.steps, "latest": self.latest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.steps, self.latest = state["steps"], state["latest"]
        self.counts = state.get("counts") or dict.fromkeys(self.sums, self.steps)

    def record(self) -> dict[str, Any]:
        """Return the means since the last record, the same on all ranks, and begin anew. Waits for the device."""
        names = sorted(self.sums)
        means = torch.stack([self.sums[name].reshape(()) / self.counts[name] for name in names]).tolist()
        elapsed = time.perf_counter() - self.start
        self.latest = {
            "seen": self.seen,
            **dict(zip(names, means, strict=True)),
            "lr": self.rate,
            "samples_per_second": self.samples / elapsed,
            "wait_share": min(self.waited / elapsed, 1.0),
        }
        self._clear()
        return self.latest


def losses_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the losses of a log record by objective."""
    return {name.removesuffix("/loss"): value for name, value in record.items() if name.endswith("/loss")}


def timed(steps: Iterator[Any], meter: Meter) -> Iterator[Any]:
    """Pass ``steps`` on, counting in ``meter`` the time that each was waited for."""
    while True:
        start = time.perf_counter()
        try:
            batches = next(steps)
        except StopIteration:
            return
        meter.waited += time.perf_counter() - start
        yield batches


def agreed(stop: bool) -> bool:
    """Return whether any rank wants to stop, the same on all; asked on the host, so no device is waited for."""
    return stop if world_size() == 1 else bool(sum_no_grad(torch.tensor(float(stop))).item())


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Give an event that SIGTERM and ctrl-C set; a second ctrl-C interrupts at once."""
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
