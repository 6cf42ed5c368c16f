"""One golden case: read it, run it through ``vlp.load``, ``model.run`` and ``model.losses``, and compare.

A case is a folder with weights in the reference's own format, recorded inputs, outputs, draws and gradient norms; its
README describes the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor

import vlp
from encoders.types import Batch
from objectives.base import Fuse, LossOutput, Pass, Replay, Results, Rows
from vlp.checkpoint.foreign import WEIGHT_FILES, read_settings, read_state, shapes_of
from vlp.checkpoint.load import recognise
from vlp.checkpoint.native import aliases
from vlp.loaded import Loaded
from vlp.model import Model

CONFIGS = ("config.json", "open_clip_config.json", "config_values.json")


@dataclass(frozen=True)
class Case:
    """A golden case as it lies on disk."""

    folder: Path
    elsewhere: tuple[Path, ...] = ()
    """Where the case whose weights this one shares is looked for, if it does not lie beside this one."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @cached_property
    def meta(self) -> dict[str, Any]:
        """case.json."""
        return json.loads((self.folder / "case.json").read_text())

    @cached_property
    def config(self) -> dict[str, Any]:
        """The authors' configuration: of this case, else of the case that holds its weights."""
        for folder in (self.folder, self.weights.parent):
            for name in CONFIGS:
                if (folder / name).is_file():
                    return json.loads((folder / name).read_text())
        return {}

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Recorded inputs and draws by name."""
        return self._tensors("inputs.safetensors")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        """Recorded outputs by name."""
        return self._tensors("outputs.safetensors")

    @cached_property
    def gradients(self) -> dict[str, float]:
        """L2 norm of the loss's gradient of each of the reference's parameters (0 = none), {} if none was recorded."""
        path = self.folder / "grad_norms.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        coverage = self.meta.get("parameter_coverage", {})
        skip = {*coverage.get("no_effect", ()), *coverage.get("shift_invariant", ())}
        return {name: norm or 0.0 for name, norm in found.items() if name not in skip}

    @cached_property
    def weights(self) -> Path:
        """The file of weights: of this case, or of the one that it names."""
        of = self.meta.get("weights_from") or self.name
        folders = [place / of for place in (self.folder.parent, *self.elsewhere)]
        files = (folder / name for folder in folders for name in WEIGHT_FILES)
        return next((file for file in files if file.is_file()), folders[0])

    def _tensors(self, name: str) -> dict[str, Tensor]:
        path = self.folder / name
        return load_file(path) if path.is_file() else {}


@dataclass(frozen=True)
class Ran:
    """What ran: the loaded model, the passes' results, the objectives' losses."""

    case: Case
    loaded: Loaded
    batch: Batch
    results: Results
    losses: Mapping[str, LossOutput]

    def __getitem__(self, wanted: Pass) -> Any:
        return self.results[wanted]

    @property
    def model(self) -> Model:
        """The loaded model."""
        return self.loaded.model

    def head(self, objective: str, states: Tensor, name: str = "head") -> Tensor:
        """Apply an objective's head to states."""
        return getattr(self.model.objectives[objective], name)(states)

    def loss(self, *objectives: str) -> Tensor:
        """Sum of these objectives' losses, each times its weight in the recipe."""
        return torch.stack([self.model.weights[one] * self.losses[one].loss for one in objectives]).sum()


Output: TypeAlias = Callable[[Ran], Tensor]


@dataclass(frozen=True)
class Adapter:
    """How the cases of a family map to our passes."""

    batch: Callable[[Case, Loaded], Batch]
    """The recorded inputs as a batch."""
    outputs: Callable[[Case], Mapping[str, Output]]
    """Reference output -> how it is read from what ran. An output of the case that is not here fails it."""
    passes: Callable[[Case], Iterable[Pass]] = lambda case: ()
    """Passes to run beside those that the objectives need."""
    keep: Callable[[Case], Mapping[str, Tensor]] = lambda case: {}
    """Reference output -> bool mask over its leading axes: positions that count (others are padding)."""
    draws: Callable[[Case], Mapping[str, Tensor]] = lambda case: {}
    """Our draws' names -> recorded values."""
    config: Callable[[Case], Mapping[str, Any]] = lambda case: case.config
    """The authors' configuration, as ``vlp.load(config=)`` takes it."""
    settings: Callable[[Case], Mapping[str, Any]] = lambda case: {}
    """Our settings laid over it: how it is trained, which a checkpoint does not say."""
    objectives: Callable[[Case], Iterable[str] | None] = lambda case: None
    """The objectives whose losses were recorded; None: all that the recorded inputs suffice for."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Recorded outputs that are nobody's contract: name -> why. Printed."""
    gradients: bool = True
    """Whether recorded gradients are those of the objectives' weighted sum."""


@dataclass
class Verdict:
    """What a comparison found."""

    name: str
    worst: float = 0.0
    """Largest violation in units of the tolerance; <= 1 passes."""
    difference: float = 0.0
    """Largest absolute difference of a floating-point output."""
    compared: int = 0
    recorded: int = 0
    gradients: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether everything recorded was reproduced."""
        return not self.problems

    def line(self) -> str:
        """One line for a person."""
        share = f"{self.compared / max(1, self.recorded):.0%} of values"
        grads = f", {self.gradients} gradient norms" if self.gradients else ""
        state = "ok  " if self.passed else "FAIL"
        said = f"; {'; '.join(self.problems[:4])}" if self.problems else ""
        return f"{state} {self.name}: {share}{grads}, largest difference {self.difference:.1e}{said}"


def run_case(case: Case, adapter: Adapter) -> tuple[Ran, Verdict]:
    """Load, run and compare a case."""
    loaded = vlp.load(case.weights, config=adapter.config(case), settings=adapter.settings(case))
    model, verdict = loaded.model, Verdict(case.name)
    batch, draw = adapter.batch(case, loaded), Replay(adapter.draws(case))
    wanted = adapter.objectives(case)
    names = list(model.objectives) if wanted is None else list(wanted)
    with torch.no_grad():
        model.before_step()
    if case.gradients and adapter.gradients:
        _compare_gradients(case, adapter, model, batch, draw, names, verdict)
    with torch.no_grad():
        results = _results(model, adapter.passes(case), batch, draw, names)
        losses = model.losses(batch, draw, names) if names and _can_train(model, batch, names) else {}
        model.after_step()
        ran = Ran(case, loaded, batch, results, losses)
        _compare_outputs(ran, adapter, verdict)
    return ran, verdict


def _can_train(model: Model, batch: Batch, names: Sequence[str]) -> bool:
    try:
        return bool(model.active(batch, names)) and _has_labels(model, batch, names)
    except ValueError:
        return False


def _has_labels(model: Model, batch: Batch, names: Sequence[str]) -> bool:
    """Whether the batch holds every view that the objectives need (an inference case does not)."""
    from vlp.passes import views

    read = views(model.needs(model.active(batch, names)))
    return read["image"] <= batch.images.keys() and read["text"] <= batch.texts.keys()


def _results(model: Model, passes: Iterable[Pass], batch: Batch, draw: Replay, names: Sequence[str]) -> Results:
    """Run the adapter's passes; those on drawn rows after the objectives said which."""
    passes = list(passes)
    drawn = {one.rows for one in passes if isinstance(one, Fuse) and one.rows is not None}
    rows: dict[str, Rows] = {}
    if drawn:
        first = model.run([one for one in model.needs(names) if not isinstance(one, Fuse) and not _decodes(one)], batch)
        for name in names:
            rows |= model.objectives[name].rows(first, batch, draw)  # type: ignore[operator]
    return model.run(passes, batch, layers=True, rows=rows)


def _decodes(one: Pass) -> bool:
    return type(one).__name__ == "Decode"


def _compare_outputs(ran: Ran, adapter: Adapter, verdict: Verdict) -> None:
    case = ran.case
    tolerance = {"atol": 5e-5, "rtol": 1e-4} | case.meta.get("tolerance", {})
    known, keeps = adapter.outputs(case), adapter.keep(case)
    for name, wanted in case.outputs.items():
        verdict.recorded += wanted.numel()
        if name in adapter.ignored:
            continue
        if name not in known:
            verdict.problems.append(f"{name} has no adapter")
            continue
        try:
            compare(name, known[name](ran).detach(), wanted, keeps.get(name), tolerance, verdict)
        except (KeyError, AttributeError, ValueError, RuntimeError, AssertionError, IndexError, TypeError) as error:
            verdict.problems.append(
                f"{name}: {type(error).__name__} {str(error).splitlines()[0][:120] if str(error) else ''}"
            )


def compare(
    name: str, found: Tensor, wanted: Tensor, keep: Tensor | None, tolerance: Mapping[str, float], verdict: Verdict
) -> None:
    if found.shape != wanted.shape:
        verdict.problems.append(f"{name} is {tuple(found.shape)}, recorded {tuple(wanted.shape)}")
        return
    if keep is not None:
        if not keep.flatten(1).any(1).all():
            verdict.problems.append(f"{name}: a row has no position to compare")
        found, wanted = found[keep], wanted[keep]
    verdict.compared += wanted.numel()
    if not wanted.is_floating_point():
        if wrong := int((found != wanted).sum()):
            verdict.problems.append(f"{name}: {wrong} of {wanted.numel()} differ")
        return
    found, wanted = found.double(), wanted.double()
    finite = torch.isfinite(wanted)
    if not torch.equal(finite, torch.isfinite(found)):
        verdict.problems.append(f"{name}: finite in other places than recorded")
        return
    if not finite.any():
        return
    difference = (found - wanted)[finite].abs()
    worst = float((difference / (tolerance["atol"] + tolerance["rtol"] * wanted[finite].abs())).max())
    verdict.worst, verdict.difference = max(verdict.worst, worst), max(verdict.difference, float(difference.max()))
    if worst > 1:
        verdict.problems.append(f"{name}: {worst:.3g} x the tolerance (difference {float(difference.max()):.2g})")


def _once_a_module(model: Model, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's weights for ``functional_call``: under one name for each module, all of those that share one.

    Under several names of one module it would leave its last stand-in behind.
    """
    shared = [names for names in aliases(model).values() if any(one in state for one in names)]
    stored = {name: state[next(one for one in names if one in state)] for names in shared for name in names}
    places = {f"{path}.{name}" for path, part in model.named_modules() for name, _ in part.named_parameters("", False)}
    return {name: stored[name] for name in places & stored.keys() if not name.startswith("teacher.")}


def _compare_gradients(
    case: Case, adapter: Adapter, model: Model, batch: Batch, draw: Replay, names: Sequence[str], verdict: Verdict
) -> None:
    """Gradients under the reference's own names: the renaming is part of the graph."""
    stored = read_state(case.weights)
    theirs = {**read_settings(case.weights), **adapter.config(case)}
    family = recognise(shapes_of(stored), theirs, case.weights)
    leaves = {
        name: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in stored.items()
    }
    trained = _once_a_module(model, family.rename(leaves).state)
    loss, _ = torch.func.functional_call(model, trained, (batch, draw, None, names), tie_weights=False)
    loss.backward()
    for recorded, norm in case.gradients.items():
        name = next((one for one in _spellings(recorded) if one in leaves), recorded)
        if name not in leaves:
            verdict.problems.append(f"gradient of {name}: no such weight in the file")
            continue
        gradient = leaves[name].grad
        found = 0.0 if gradient is None else float(gradient.norm())
        verdict.gradients += 1
        if abs(found - norm) > 1e-5 + 1e-3 * abs(norm):
            verdict.problems.append(f"gradient of {name}: {found:.5g}, recorded {norm:.5g}")


def _spellings(name: str) -> tuple[str, ...]:
    """A parameter's name, and what transformers 5 calls it in memory or in files where the two differ.

    Such are the layers of AltCLIP, and a word head's bias, of whose two names FLAVA's files keep the other.
    """
    head, _, last = name.rpartition(".")
    return (
        name,
        name.replace("encoder.layers.", "encoder.layer."),
        name.replace("encoder.layer.", "encoder.layers."),
        f"{head}.decoder.{last}",
    )
