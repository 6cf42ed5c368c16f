"""What training leaves behind and comes back to: checkpoints with the optimizer's state.

Nothing else needs a state: data order, masks, negatives and dropout are pure functions of (seed, samples seen, rank).
"""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from objectives.collectives import rank, sum_no_grad, world_size
from vlp.checkpoint.native import AVERAGE, CONFIG, find_checkpoint, save_checkpoint, weights_of
from vlp.config import Config, to_yaml
from vlp.train.lora import apart, merged
from vlp.train.step import NonFiniteError, TrainStep

if TYPE_CHECKING:
    from vlp.run import Parts
    from vlp.train.evaluation import Evaluation

logger = logging.getLogger(__name__)

STATE_FILE = "train_state.pt"


class TrainState:
    """Saves and restores one run.

    Args:
        folder: of the run.
        parts: what is saved beside the weights.
        step: holder of optimizer and averages.
        command: for the model card.
        keep: checkpoints to keep, newest first.
        evaluation: whose memory is saved with the run.

    Attributes:
        latest: the last checkpoint.
        best: the one that the evaluation called the best, which is kept beside the newest; None: none yet.
    """

    def __init__(
        self,
        folder: Path,
        parts: Parts,
        step: TrainStep,
        command: str,
        keep: int,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.folder, self.parts, self.step, self.command, self.keep = folder, parts, step, command, keep
        self.evaluation, self.latest = evaluation, folder
        self.best: Path | None = None

    def save(self, seen: int, metrics: Mapping[str, Any], memory: Mapping[str, Any], *, best: bool = False) -> None:
        """Write the checkpoint of ``seen`` samples; all ranks wait until it is whole.

        Args:
            seen: samples of the run so far.
            metrics: for the model card.
            memory: what else a resumed run needs, by name.
            best: whether it is the best so far.
        """
        from vlp.checkpoint.card import model_card

        self.latest = self.folder / "checkpoints" / f"{seen:012d}"
        self.best = self.latest if best else self.best
        if rank() == 0:
            buffer = io.BytesIO()
            state = {"seen": seen, **memory, **self.step.state_dict()}
            if self.evaluation is not None:
                name = None if self.best is None else self.best.name
                state |= {"evaluation": self.evaluation.state_dict(), "best": name}
            model, average = self.parts.model, None if self.step.average is None else self.step.average.module
            if self.parts.run.train.lora is not None:
                state["lora"] = apart(model)
                model, average = merged(model), None if average is None else merged(average)  # type: ignore[assignment]
            torch.save(state, buffer)
            extra: dict[str, bytes | Mapping[str, Tensor]] = {STATE_FILE: buffer.getvalue()}
            if average is not None:
                extra[AVERAGE] = weights_of(average)
            reader = self.parts.reader
            data = None if reader is None else {"samples": len(reader), "fingerprint": reader.fingerprint}
            card = model_card(self.parts.run, metrics, self.command, model, data=data)
            save_checkpoint(self.latest, model, self.parts.run, self.parts.tokenizer, card, extra)
            self._clean()
        if world_size() > 1:
            dist.barrier()

    def _clean(self) -> None:
        """Remove what is older than the checkpoints to keep, and what killed runs left half written.

        Later checkpoints are torn, or the run would have gone on from them; they do not count as kept.
        """
        folder = self.latest.parent
        older = sorted(path for path in folder.glob("[0-9]*") if path.name < self.latest.name and path != self.best)
        for path in [*older[: max(len(older) + 1 - self.keep, 0)], *folder.glob(".*.partial")]:
            shutil.rmtree(path)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint.

        Raises:
            ValueError: only one of the two runs has a moving average, or low-rank differences.
        """
        if ("lora" in state) != (self.parts.run.train.lora is not None):
            raise ValueError("train.lora differs from the run that is resumed; keep its setting")
        self.parts.model.load_state_dict(state.get("lora", {}), strict=False)
        self.step.load_state_dict(state)
        if self.evaluation is not None and "evaluation" in state:
            self.evaluation.load_state_dict(state["evaluation"])
            self.best = None if state["best"] is None else self.folder / "checkpoints" / state["best"]

    def keep_batch(self, error: NonFiniteError) -> Path:
        """Write the batch of a step that gave no finite loss; return where."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"nonfinite_rank{rank()}.pt"
        torch.save([batch.to("cpu") for batch in error.batches], path)
        return path


def check_same(seen: int, folder: Path) -> None:
    """Refuse ranks that found different checkpoints, as on folders that are not shared, or are seen late.

    They would read different samples, and the last would wait for steps that the others have behind them.

    Raises:
        ValueError: other ranks go on from elsewhere.
    """
    if int(sum_no_grad(torch.tensor(seen)).item()) != seen * world_size():
        raise ValueError(
            f"--resume {folder}: rank {rank()} found a checkpoint of {seen:,} samples, and another rank another one; "
            "let all ranks see the same folder"
        )


def write_config(folder: Path, run: Config) -> None:
    """Write the resolved config into a run's folder, where it is found before there is a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(to_yaml(run), encoding="utf-8")


def read_state(run: Path) -> tuple[Path, dict[str, Any]]:
    """Return the newest whole checkpoint of a run folder and its training state; all ranks must call it.

    Raises:
        ValueError: there is none, it holds no training state, or other ranks found another one.
    """
    checkpoint = find_checkpoint(run, newest=True)
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise ValueError(f"--resume {run}: {checkpoint.name} holds no training state; use it with --init instead")
    state = torch.load(path, map_location="cpu", weights_only=True)
    check_same(state["seen"], run)
    return checkpoint, state
