"""Each objective against chance, after a few hundred steps of a tiny model: ``make objectives``.

Trains one tiny model an objective on emoji in two drawing styles, without a loader, and prints its loss: that of the
best blind guess, before, after, and after in a style that is never seen.
``python scripts/objectives_table.py [ROW...] [--steps 300] [--write configs/README.md]``
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from encoders.types import Batch
from objectives.base import Draw
from scripts.trials.data import HELD_OUT, TRAIN, batches, tokenizer, tokens_of
from scripts.trials.trials import TRIALS, Trial
from vlp.config import build
from vlp.model import Model, build_model
from vlp.recipes import did_you_mean
from vlp.run import RunConfig

BEGIN, END = "<!-- objectives:begin -->", "<!-- objectives:end -->"
BATCH, MEASURED = 48, 5
"""Samples of a step, and batches that a loss is measured on."""
RATE = 2e-3


@dataclass(frozen=True)
class Row:
    """Losses of one objective."""

    name: str
    chance: float
    before: float
    after: float
    held_out: float

    @property
    def learned(self) -> bool:
        """Whether it is better than a blind guess on the data that it was trained on."""
        return self.after < self.chance


def run_trial(name: str, trial: Trial, steps: int) -> Row:
    """Train a model on one objective, and those that go with it."""
    config = build(RunConfig, trial.tree())
    steps *= trial.longer
    words = tokenizer(tokens_of(config.objectives.values()))
    model = build_model(config.model, config.objectives, vocabulary_size=words.vocabulary.size).train()
    measured = list(batches(model, trial.make, TRAIN, BATCH, MEASURED, seed=1))
    unseen = list(batches(model, trial.make, HELD_OUT, BATCH, MEASURED, seed=2))
    objective = next(iter(config.objectives))
    before = measure(model, objective, measured)
    train(model, batches(model, trial.make, TRAIN, BATCH, steps), steps)
    chance = trial.chance(model, list(batches(model, trial.make, TRAIN, BATCH, 10, seed=3)))  # labels may be learned
    return Row(name, chance, before, measure(model, objective, measured), measure(model, objective, unseen))


def train(model: Model, data: Iterable[Batch], steps: int) -> None:
    """AdamW, its learning rate raised over a tenth of the steps and lowered over the others."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.05)
    for step, batch in enumerate(islice(data, steps)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        optimizer.zero_grad()
        model.before_step()
        model(batch, Draw(0, step))[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.after_step()


@torch.no_grad()
def measure(model: Model, objective: str, data: Iterable[Batch]) -> float:
    """Mean loss of one objective over batches, as at the end of training."""
    model.eval()
    losses = [model.losses(batch, Draw(1, step))[objective].loss.item() for step, batch in enumerate(data)]
    model.train()
    return sum(losses) / len(losses)


def table(rows: Iterable[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| objective | blind guess | before | after | unseen style, after |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = " | ".join(f"{number:.3f}" for number in (row.chance, row.before, row.after, row.held_out))
        lines.append(f"| {row.name} | {numbers} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help="rows of the table; all by default")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--write", type=Path, help="page whose table between the markers is replaced")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if unknown := [name for name in arguments.rows if name not in TRIALS]:
        parser.error(f"{unknown[0]}: no such row; {did_you_mean(unknown[0], TRIALS)}")
    rows = []
    for name in arguments.rows or TRIALS:
        start = time.process_time()
        rows.append(run_trial(name, TRIALS[name], arguments.steps))
        sys.stderr.write(f"{table(rows[-1:]).splitlines()[-1]} {time.process_time() - start:.0f} s\n")
    text = table(rows)
    print(text)
    if arguments.write is not None:
        page = arguments.write.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        arguments.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0 if all(row.learned for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
