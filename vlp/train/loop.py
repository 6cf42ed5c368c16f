"""The training loop: steps of samples, a log, checkpoints, and a clean end on a signal."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from encoders.patch import PatchEncoder
from objectives.base import Objective
from objectives.collectives import rank, world_size
from vlp.data.fetch import Prepare, pair_example
from vlp.data.loader import Loader
from vlp.fit import untrained
from vlp.passes import reads_inner
from vlp.train.config import TrainConfig
from vlp.train.evaluation import Evaluation, Verdict, evaluated
from vlp.train.health import Watch, chance_levels
from vlp.train.log import RunLog
from vlp.train.lora import adapt, merge
from vlp.train.meter import Meter, losses_of, timed
from vlp.train.optim import freeze_parts
from vlp.train.reading import open_loader
from vlp.train.sample import check_sample, sampled
from vlp.train.signals import agreed, stop_signal
from vlp.train.state import TrainState, write_config
from vlp.train.step import NonFiniteError, Rewrite, StepReport, TrainStep

if TYPE_CHECKING:
    from vlp.run import Parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    checkpoint: Path
    """The last checkpoint."""
    seen: int
    """Samples seen."""
    finished: bool
    """Whether all samples were seen, or the evaluation ended it (else a signal did)."""
    best: Path | None = None
    """The checkpoint that the evaluation called the best; None: there was no evaluation."""


def train(
    parts: Parts,
    folder: Path,
    device: torch.device,
    *,
    prepare: Prepare = pair_example,
    command: str = "",
    seen: int = 0,
    restored: Mapping[str, Any] | None = None,
    evaluation: Evaluation | None = None,
    rewrite: Rewrite | None = None,
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
        evaluation: looks at the model every so many samples and at the end; None: nobody does.
        rewrite: gives what each micro-batch is trained on (captions that the model wrote); None: itself.

    Raises:
        ValueError: the data are unusable, or a tower that is not frozen is trained by no objective.
        NonFiniteError: a loss or gradient was not finite; nothing was updated, the batch lies in the folder.
    """
    config = parts.run.train
    check_sample(config.sample, dict(parts.model.objectives.items()))  # type: ignore[arg-type]
    freeze_parts(parts.model, config.optim)
    if problems := untrained(parts.model):
        raise ValueError("; ".join(problems))
    if config.lora is not None:
        adapt(parts.model, config.lora, config.seed)
    model = wrap(parts.model.to(device).train(), config, device, leaves_out=bool(config.sample or parts.sources))
    loader = open_loader(parts, prepare)
    more: dict[str, Any] = {"precision": config.precision, "adversarial": config.adversarial, "rewrite": rewrite}
    step = TrainStep(model, config.optim, seed=config.seed, total=config.samples, **more)
    state = TrainState(folder, parts, step, command, config.keep, evaluation)
    meter = Meter(device)
    if restored is not None:
        state.restore(restored)
        meter.restore(restored["meter"])
    watch = watch_over(parts)
    if rank() == 0:
        write_config(folder, parts.run)  # only now: all that can be wrong with it has been said
    log = RunLog(folder, config.samples, seen, watch.chances, quiet=rank() != 0)
    try:
        steps = _Steps(config, step, state, meter, log, watch, evaluation)
        ended = steps.run(loader, seen, (restored or {}).get("positions"))
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}; the batch is in {state.keep_batch(error)}", error.batches) from error
    finally:
        log.close()
    loader.report_bad()
    if config.lora is not None:
        merge(parts.model)
    return ended


@dataclass(frozen=True)
class _Steps:
    """The steps of a run, and what is due after each."""

    config: TrainConfig
    step: TrainStep
    state: TrainState
    meter: Meter
    log: RunLog
    watch: Watch
    evaluation: Evaluation | None

    def run(self, loader: Loader, seen: int, positions: Mapping[str, int] | None) -> Outcome:
        """Train from ``seen`` samples on, to the last one, a signal or the evaluation's word.

        Args:
            loader: of the data.
            seen: samples that the run has seen.
            positions: those of each source; None: as steps of this size have.
        """
        config = self.config
        finished = config.samples - seen < world_size()  # a step needs a sample per rank
        with stop_signal() as stop:
            for batches in timed(loader.steps(seen, config.samples, positions), self.meter):
                report = self.step(batches, sampled(config.sample, config.seed, batches[0].seen))
                self.meter.add(report)
                seen = report.seen
                last = config.samples - seen < world_size()
                if self.meter.steps >= config.log_every or last:
                    tell(self.meter.record(), self.log, self.watch)
                verdict = self._evaluate(report, last)
                finished, stopping = last or verdict.stop, agreed(stop.is_set())
                if passed(config.saved_every, report) or finished or stopping or verdict.best:
                    memory = {"meter": self.meter.state(), "positions": loader.positions}
                    self.state.save(seen, self.meter.latest, memory, best=verdict.best)
                if stopping and not finished:
                    logger.warning("stopped by a signal at %d samples; go on with --resume %s", seen, self.state.folder)
                if stopping or finished:
                    break
        return Outcome(self.state.latest, seen, finished, self.state.best)

    def _evaluate(self, report: StepReport, last: bool) -> Verdict:
        """Evaluate where it is due."""
        if self.evaluation is None or not (last or passed(self.evaluation.every, report)):
            return Verdict()
        start = time.perf_counter()
        verdict = evaluated(self.evaluation, self.step, report.seen)
        self.meter.leave_out(time.perf_counter() - start)
        if verdict.metrics:
            self.log.add({"seen": report.seen, **{f"val/{name}": value for name, value in verdict.metrics.items()}})
        return verdict


def passed(every: int, report: StepReport) -> bool:
    """Return whether a step passed a multiple of ``every`` samples."""
    return report.seen // every > report.started // every


def tell(record: Mapping[str, Any], log: RunLog, watch: Watch) -> None:
    """Write a record, and say in words what it shows."""
    log.write(record)
    for sentence in watch.look(record["seen"], losses_of(record), record["wait_share"]):
        logger.warning(sentence)


def watch_over(parts: Parts) -> Watch:
    """Return the watch of a run's losses, and say their chance levels."""
    config = parts.run.train
    objectives = {name: one for name, one in parts.model.objectives.items() if isinstance(one, Objective)}
    chances = chance_levels(objectives, config.global_batch)
    logger.info("chance levels: %s", ", ".join(f"{name} {level:.3f}" for name, level in chances.items()))
    return Watch(chances, patience=max(config.samples // 5, 20 * config.global_batch))


def wrap(model: nn.Module, config: TrainConfig, device: torch.device, leaves_out: bool = False) -> nn.Module:
    """Compile and distribute the model where the run asks for it.

    Args:
        model: to train.
        config: of the run.
        device: of this rank.
        leaves_out: whether a step leaves out objectives, so that parameters get no gradient.

    Raises:
        ValueError: it is to be compiled, but what its parts read is to be changed.
    """
    if config.compile and config.adversarial:
        raise ValueError("train.adversarial changes what parts of the model read, which train.compile fixes; set one")
    if config.compile:
        compile_parts(model)
    if world_size() == 1:
        return model
    # Buffers are constants, or equal on all ranks because what fills them is gathered, or averaged by the step (batch
    # norms): there is nothing to broadcast.
    device_ids = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():  # newer torches have another name for it, under which they broadcast once
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=device_ids,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=leaves_out,
        )


def compile_parts(model: nn.Module) -> None:
    """Compile encoders and fusion, but for a ViT that works by hooks of single calls, which compiled code passes over.

    Its masked patches would be shown, and the states of its inner layers be those of the last.
    """
    parts = {name: getattr(model, name) for name in ("vision", "text", "fusion")}
    inner = reads_inner(parts["fusion"])
    for name, part in parts.items():
        if isinstance(part, PatchEncoder) and (inner or part.takes_hooks):
            logger.info(
                "train.compile leaves model.%s as it is: its patches are masked, its layers or regions read", name
            )
        elif isinstance(part, nn.Module):
            part.compile()
