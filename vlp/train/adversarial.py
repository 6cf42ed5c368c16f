"""Adversarial training in the embedding space (Gan et al. 2020, VILLA, section 3.3).

Each micro-batch runs several times, with noise on the words' embeddings or the regions' features that grows in the
direction that raises the loss.

The step's gradient is the mean over these runs, whose predictions are held near those of the first, which has no noise.
Shapes: R rows of a head, C its classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from encoders.region import RegionEncoder
from encoders.text import TextEncoder
from encoders.types import Regions
from objectives.answer import Answer
from objectives.base import Draw, LossOutput
from objectives.itm import Itm
from objectives.mlm import Mlm
from objectives.mrm import Mrm
from vlp.config import Config
from vlp.model import Model

Forward = Callable[[], tuple[Tensor, dict[str, LossOutput]]]


class AdversarialConfig(Config):
    """Noise that raises the loss."""

    modality: Literal["text", "image", "either"] = "either"
    """On the words' embeddings, on the regions' features, or on one of the two, drawn for each step."""
    steps: int = Field(3, ge=1)
    """Runs of each micro-batch; the first has no noise."""
    lr: float = Field(1e-3, gt=0)
    """How far the noise of a sample moves between two runs (its norm)."""
    kl: float = Field(1.5, ge=0)
    """Weight of the divergence of the predictions from those without noise, and back."""


class _Noise:
    """What is added to the calls of one module, in their order; one tensor a call."""

    def __init__(self) -> None:
        self.deltas: list[Tensor] = []
        self.call = 0

    def add(self, clean: Tensor) -> Tensor:
        if self.call == len(self.deltas):
            self.deltas.append(torch.zeros_like(clean, dtype=torch.float32).requires_grad_())
        self.call += 1
        return clean + self.deltas[self.call - 1].to(clean.dtype)

    def ascend(self, lr: float) -> None:
        """Move each sample's noise along its gradient, by ``lr``."""
        self.call = 0
        for number, delta in enumerate(self.deltas):
            if delta.grad is None:
                continue
            norm = delta.grad.flatten(1).norm(dim=1).clamp(min=1e-8)
            step = delta.grad / norm.view(-1, *(1,) * (delta.dim() - 1))
            self.deltas[number] = (delta + lr * step).detach().requires_grad_()


class Adversary:
    """Runs micro-batches with noise.

    Args:
        model: whose words or regions get it.
        config: how.
        seed: the run's.

    Raises:
        ValueError: the model's embeddings are another library's, or it has no regions.
    """

    def __init__(self, model: Model, config: AdversarialConfig, seed: int) -> None:
        self.model, self.config, self.seed = model, config, seed
        if config.modality != "image" and not isinstance(model.text, TextEncoder):
            raise ValueError(
                "train.adversarial needs model.text.kind text, whose words get the noise; use modality image"
            )
        if config.modality != "text" and not isinstance(model.vision, RegionEncoder):
            raise ValueError(
                "train.adversarial puts noise on a detector's regions, but model.vision.kind is "
                f"{model.vision.config.kind}; use modality text"
            )

    def backward(
        self,
        forward: Forward,
        names: Iterable[str],
        step: int,
        share: float,
        sync: Callable[[bool], AbstractContextManager],
    ) -> dict[str, LossOutput]:
        """Run a micro-batch ``config.steps`` times and add the mean of the runs' gradients.

        Args:
            forward: the loss of the micro-batch and the objectives' outputs, the same in each run but for the noise.
            names: of the objectives that run.
            step: samples seen, by which the modality is drawn.
            share: of the micro-batch in the step.
            sync: context of a run; True for the last, whose backward may cross ranks.

        Returns:
            The outputs of the run without noise.
        """
        config, noise = self.config, _Noise()
        modality: str = config.modality
        if modality == "either":
            modality = "text" if Draw(self.seed, step).uniform("adversarial", (1,), "cpu").item() < 0.5 else "image"
        first: dict[str, LossOutput] = {}
        clean: list[Tensor] = []
        for number in range(config.steps):
            said: list[Tensor] = []
            with sync(number == config.steps - 1):
                with self._noisy(modality, noise), self._listening(names, said):
                    loss, outputs = forward()
                if number == 0:
                    first, clean = outputs, [logits.detach() for logits in said]
                elif config.kl:
                    parts = [divergence(logits, wanted) for logits, wanted in zip(said, clean, strict=True)]
                    loss = loss + share * config.kl * sum(parts, loss.new_zeros(()))
                (loss / config.steps).backward()
            noise.ascend(config.lr)
        return first

    @contextmanager
    def _noisy(self, modality: str, noise: _Noise) -> Iterator[None]:
        """Add the noise to every call of the word embedding, or to the regions that the vision encoder is given."""
        if modality == "text":
            assert isinstance(self.model.text, TextEncoder)
            handle = self.model.text.embeddings.word.register_forward_hook(lambda *call: noise.add(call[2]))
        else:
            handle = self.model.vision.register_forward_pre_hook(lambda module, given: _noisy_regions(noise, given))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _listening(self, names: Iterable[str], said: list[Tensor]) -> Iterator[None]:
        """Note the logits of every head that chooses among classes, in the order of the calls."""
        with ExitStack() as stack:
            for name in names:
                objective = self.model.objectives[name]
                if isinstance(objective, Answer | Itm | Mlm | Mrm):
                    chosen = _class_targets(objective) if isinstance(objective, Mrm) else None
                    handle = objective.head.register_forward_hook(partial(_note, said, chosen))
                    stack.callback(handle.remove)
            yield


def _noisy_regions(noise: _Noise, given: tuple[Any, ...]) -> tuple[Any, ...]:
    regions = given[0]
    assert isinstance(regions, Regions)
    return replace(regions, features=noise.add(regions.features)), *given[1:]


def _class_targets(objective: Mrm) -> list[str]:
    """Names of the outputs that are logits, not features."""
    classes = {"kl", "best_class", "class"}
    return [name for name, target in objective.config.targets.items() if classes & set(target.losses)]


def _note(said: list[Tensor], chosen: list[str] | None, head: nn.Module, given: Any, output: Any) -> None:
    if chosen is None:
        said.append(output)
    else:
        assert isinstance(output, Mapping)
        said.extend(output[name] for name in chosen)


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two sets of logits [R, C], both ways, mean over rows."""
    ours, theirs = (each.float().flatten(0, -2).log_softmax(-1) for each in (logits, wanted))
    return ((ours.exp() - theirs.exp()) * (ours - theirs)).sum(-1).mean()
