"""One optimizer step: micro-batches -> exact mean over all of them and all ranks -> update, or a stop that says where.

What crosses ranks in a step: the counts at its start, the gradients with the last micro-batch (DDP), what objectives
gather, and one small vector of losses and metrics, which makes report and stop the same on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from encoders.types import Batch
from objectives.base import Draw, LossOutput
from objectives.collectives import rank, sum_no_grad, world_size
from objectives.itc import ItcConfig
from vlp.model import Model, global_counts
from vlp.train.accumulate import contrast_step, seed_dropout
from vlp.train.adversarial import AdversarialConfig, Adversary
from vlp.train.optim import OptimConfig, build_average, build_optimizer, learning_rate, set_learning_rate

Precision: TypeAlias = Literal["auto", "fp32", "bf16"]

Rewrite: TypeAlias = Callable[[Model, Batch, Draw], tuple[Batch, dict[str, Tensor]]]
"""What a model is trained on in place of a micro-batch, where that hangs on the model itself: texts that it wrote."""


class NonFiniteError(ValueError):
    """A loss or the gradient is not finite; raised on all ranks before the update.

    Attributes:
        batches: this rank's micro-batches of the step.
    """

    def __init__(self, message: str, batches: Sequence[Batch] = ()) -> None:
        super().__init__(message)
        self.batches = list(batches)


@dataclass(frozen=True)
class StepReport:
    """What a step did; the scalars stay on the device until someone wants them."""

    scalars: dict[str, Tensor]
    """``loss`` (weighted sum), ``NAME/loss`` and ``NAME/METRIC`` of every objective, means over all micro-batches and
    ranks; ``grad_norm`` before clipping; ``scale``, the inverse temperature, after the update."""
    lr: float
    """Learning rate of a parameter without multiplier."""
    started: int
    """Samples that the run had seen before."""
    seen: int
    """Samples that it has seen now."""


class TrainStep:
    """Updates a model.

    Args:
        model: a :class:`Model`, or DDP around one; on its device, in training mode.
        config: optimizer and schedule.
        seed: the run's.
        total: samples of the whole run.
        precision: "auto": bf16 autocast on CUDA, fp32 elsewhere.
        adversarial: noise that each micro-batch is run with; None: none.
        rewrite: gives what each micro-batch is trained on; None: itself.

    Attributes:
        average: the moving average of the weights, in ``average.module``; None if the recipe asks for none.

    Raises:
        ValueError: the optimizer's settings do not fit the model or the run.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        *,
        seed: int,
        total: int,
        precision: Precision = "auto",
        adversarial: AdversarialConfig | None = None,
        rewrite: Rewrite | None = None,
    ) -> None:
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        assert isinstance(inner, Model)
        learning_rate(config, 0, total)  # a warmup that does not fit is an error now, not at the first step
        self.wrapped, self.model = model, inner
        self.config, self.seed, self.total, self.rewrite = config, seed, total, rewrite
        self.adversary = None if adversarial is None else Adversary(inner, adversarial, seed)
        self.device = inner.device
        self.bf16 = precision == "bf16" or (precision == "auto" and self.device.type == "cuda")
        self.optimizer = build_optimizer(inner, config)
        self.average = build_average(inner, config)
        self._statistics = running_statistics(inner) if world_size() > 1 else []
        self._clamp_scale()

    def __call__(self, batches: Sequence[Batch], names: Iterable[str] | None = None) -> StepReport:
        """Train on one step's micro-batches.

        Args:
            batches: this rank's, as many as every other rank has, none of them empty.
            names: only these objectives, the same on all ranks.

        Raises:
            NonFiniteError: on all ranks; weights, optimizer and average are those from before the step.
        """
        batches, told = [batch.to(self.device) for batch in batches], dict[str, Tensor]()
        started = batches[0].seen
        if self.rewrite is not None:
            with self._precision():
                draws = self._draws(batches)
                made = [self.rewrite(self.model, one, draw) for one, draw in zip(batches, draws, strict=True)]
            batches, told = [batch for batch, _ in made], self._told(made)
        samples = count_samples(batches)
        self.optimizer.zero_grad()
        self.model.before_step()
        scalars = self._backward(batches, started, None if names is None else list(names))
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        norm = get_total_norm(list(gradients.values()))
        self._require_finite(scalars, norm, gradients, batches)
        if self.config.clip_norm is not None:
            clip_grads_with_norm_(self.model.parameters(), self.config.clip_norm, norm)
        # The rate at the step's middle sample: neither the first step nor the last has a rate of zero.
        rate = self.config.lr * learning_rate(self.config, started + samples / 2, self.total)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.model.after_step()
        self._share_statistics()
        self._clamp_scale()
        if self.average is not None:
            self.average.update_parameters(self.model)
        scalars |= told | {"grad_norm": norm}
        if (space := self.model.space()) is not None:
            scalars["scale"] = space.logit_scale.detach().exp()[0]
        return StepReport(scalars, rate, started, started + samples)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the weights; the optimizer's moments by parameter name."""
        average = None if self.average is None else self.average.state_dict()
        names = self._optimized()
        moments = {names[number]: state for number, state in self.optimizer.state_dict()["state"].items()}
        return {"optimizer": moments, "average": average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave. The optimizer's settings stay those of this run's config.

        Raises:
            ValueError: only one of the two runs has a moving average.
        """
        if (self.average is None) != (state["average"] is None):
            raise ValueError(f"ema {self.config.ema} differs from the run that is resumed; keep its setting")
        own, moments = self.optimizer.state_dict(), state["optimizer"]
        own["state"] = {number: moments[name] for number, name in enumerate(self._optimized()) if name in moments}
        self.optimizer.load_state_dict(own)
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _optimized(self) -> list[str]:
        """Names of the optimizer's parameters, in the order in which its state counts them."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def _backward(self, batches: Sequence[Batch], started: int, names: list[str] | None) -> dict[str, Tensor]:
        """Sum the step's gradients; return its losses and metrics."""
        number, last = len(batches), len(batches) - 1
        draws = self._draws(batches)
        counts = [self.model.counts(batch, names) for batch in batches]
        totals = global_counts(sum_by_name(counts))
        contrast = contrast_step(self.model, batches, draws, names, totals, self._precision)
        several = len({batch.source for batch in batches}) > 1
        terms = [(contrast.outputs, contrast.counts)]
        for index, (batch, draw) in enumerate(zip(batches, draws, strict=True)):
            received = contrast.gradients.get(index)
            chosen = [name for name in counts[index] if name not in contrast.outputs]
            forward = partial(self._forward, batch, draw, totals, chosen, received)
            crossing = index == last and not several
            if self.adversary is None:
                with self._sync(crossing):
                    loss, outputs = forward()
                    loss.backward()
            else:
                sync = partial(self._sync_if, crossing)
                outputs = self.adversary.backward(forward, chosen, started, 1 / number, sync)
            terms.append((outputs, counts[index]))
        if several:
            self._average_gradients()
        return self._mean(terms, totals)

    def _draws(self, batches: Sequence[Batch]) -> list[Draw]:
        """The randomness of each micro-batch."""
        number = len(batches)
        return [Draw(self.seed, batches[0].seen, rank() * number + index) for index in range(number)]

    def _told(self, made: Sequence[tuple[Batch, dict[str, Tensor]]]) -> dict[str, Tensor]:
        """What was said of the rewritten micro-batches: means over all images, on all ranks."""
        names = list(made[0][1])
        rows = [torch.stack([*(told[name] for name in names), torch.ones(())]) * one.num_images for one, told in made]
        total = sum_no_grad(torch.stack(rows).sum(0).to(self.device))
        return dict(zip(names, total[:-1] / total[-1], strict=True))

    def _average_gradients(self) -> None:
        """Average the gradients over ranks, where DDP cannot: its last backward sees only what the last source trains.

        All ranks have the same sources in the same order, so the same parameters have a gradient.
        """
        if not isinstance(self.wrapped, DistributedDataParallel):
            return
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        joined = sum_no_grad(torch.cat([one.flatten() for one in gradients])) / world_size()
        for one, mean in zip(gradients, joined.split([one.numel() for one in gradients]), strict=True):
            one.copy_(mean.view_as(one))

    def _forward(self, batch: Batch, draw: Draw, *rest: Any) -> tuple[Tensor, dict[str, LossOutput]]:
        """Run the wrapped model; the same again gives the same."""
        seed_dropout(draw)
        with self._precision():
            return self.wrapped(batch, draw, *rest)

    def _sync_if(self, last_batch: bool, last_run: bool) -> AbstractContextManager:
        return self._sync(last_batch and last_run)

    def _sync(self, last: bool) -> AbstractContextManager:
        """Let DDP average the gradients once a step: while the last micro-batch runs backward."""
        return (
            nullcontext() if last or not isinstance(self.wrapped, DistributedDataParallel) else self.wrapped.no_sync()
        )

    @torch.no_grad()
    def _mean(
        self, terms: Sequence[tuple[Mapping[str, LossOutput], Mapping[str, Tensor]]], totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return losses and metrics, weighted by their counts, over all micro-batches and ranks."""
        parts = []
        for outputs, counts in terms:
            for name, output in outputs.items():
                share = counts[name] / totals[name].clamp(min=1)
                values = {"loss": output.loss, **output.metrics}
                parts.append({f"{name}/{key}": value.detach().reshape(()) * share for key, value in values.items()})
        sums = sum_by_name(parts)
        joined = sum_no_grad(torch.stack([value.to(torch.get_default_dtype()) for value in sums.values()]))
        found = dict(zip(sums, joined.unbind(), strict=True))
        found["loss"] = torch.stack([self.model.weights[name] * found[f"{name}/loss"] for name in totals]).sum()
        return found

    def _require_finite(
        self, scalars: Mapping[str, Tensor], norm: Tensor, gradients: dict[str, Tensor], batches: Sequence[Batch]
    ) -> None:
        """Stop before the update if a loss or the gradient is not finite.

        This is the only place of a step that waits for the device, every step, because nothing else keeps bad weights
        out of the average and of checkpoints. It costs little: the update that follows keeps the device busy while the
        host gets ahead again. Losses and gradients are sums over ranks, so all ranks decide alike.
        """
        losses = {name: value for name, value in scalars.items() if name.endswith("/loss")}
        if torch.isfinite(torch.stack([*losses.values(), norm.to(next(iter(losses.values())).dtype)])).all().item():
            return
        bad = [
            f"{name.removesuffix('/loss')} ({value.item()})" for name, value in losses.items() if not value.isfinite()
        ]
        spoilt = [name for name, parameter in self.model.named_parameters() if not parameter.isfinite().all()]
        what = f"loss of {', '.join(bad)}" if bad else "gradient"
        said = [f"the step at {batches[0].seen} samples: {what} is not finite"]
        said.append("gradient norms: " + ", ".join(f"{name} {value:.3g}" for name, value in largest_norms(gradients)))
        if spoilt:
            said.append(f"weights that are not finite: {', '.join(spoilt[:3])}")
        said.append("nothing was updated; lower optim.lr or look at the batch")
        raise NonFiniteError("; ".join(said), batches)

    @torch.no_grad()
    def _share_statistics(self) -> None:
        """Give all ranks the mean of what their batch norms remember, which is of their own images alone.

        Else ranks would evaluate different models, of which the first one's is saved.
        """
        if self._statistics:
            joined = sum_no_grad(torch.cat(self._statistics)) / world_size()
            for one, mean in zip(self._statistics, joined.split([len(one) for one in self._statistics]), strict=True):
                one.copy_(mean)

    @torch.no_grad()
    def _clamp_scale(self) -> None:
        """Keep the temperature within the bounds of the objectives that train it."""
        for config in self.model.objective_configs.values():
            if isinstance(config, ItcConfig) and (space := self.model.space(config.branch)) is not None:
                space.logit_scale.clamp_(math.log(config.min_scale), math.log(config.max_scale))


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return mean and variance, [C] each, of every batch norm that goes on following them: it is in training mode."""
    kinds = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
    norms = [part for part in model.modules() if isinstance(part, kinds) and part.training]
    return [one for part in norms for one in (part.running_mean, part.running_var) if one is not None]


def sum_by_name(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Add scalars of equal name."""
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = found[name] + value if name in found else value
    return found


def count_samples(batches: Sequence[Batch]) -> int:
    """Return the samples of a step over all ranks; the host knows them."""
    total = 0
    for batch in batches:
        own = (batch.num_images, batch.num_texts)
        number = own[0] or own[1] if batch.position is None else batch.position.shape[0]
        # A sample is an image, or a text where texts have no image or several.
        side = 0 if own[0] == number else 1
        total += sum(sizes[side] for sizes in batch.counts or (own,) * world_size())
    return total


def largest_norms(gradients: dict[str, Tensor], number: int = 3) -> list[tuple[str, float]]:
    """Return the layers with the largest gradient norms, those that are not finite first.

    Among these the last of the model come first: backward passes on what is not finite to the layers before.
    """
    layers: dict[str, list[Tensor]] = {}
    for name, gradient in reversed(gradients.items()):
        layers.setdefault(layer_of(name), []).append(gradient)
    norms = {name: get_total_norm(parts).item() for name, parts in layers.items()}
    return sorted(norms.items(), key=lambda item: -item[1] if math.isfinite(item[1]) else -math.inf)[:number]


def layer_of(parameter: str) -> str:
    """Return the layer of a parameter: its name up to the first number, else without its last word."""
    words = parameter.split(".")
    numbers = [index for index, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: numbers[0] + 1] if numbers else words[:-1] or words)
