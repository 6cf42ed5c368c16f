"""Stand-ins for golden cases that are not at hand: a case folder written from a plain reference, and its verdict."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import golden_tasks
import torch
from safetensors.torch import save_file
from torch import Tensor

from scripts.goldens.base import Case, Verdict, run_case
from scripts.goldens.cases import ADAPTERS

GOLDENS = Path(__file__).parent / "goldens"
Weights = dict[str, Tensor]


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Noise for every parameter: norms around one, maps of a width that keeps states of order one."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        gain = name.endswith(".weight") and len(shape) == 1
        scale = 0.2 if len(shape) < 2 else min(1.0, 1.5 / shape[-1] ** 0.5)
        found[name] = noise * scale + (1.0 if gain or "logit" in name else 0.0)
    return found


def stand_in(
    folder: Path,
    weights: Weights,
    inputs: Mapping[str, Tensor],
    reference: Callable[[Weights], Mapping[str, Tensor]],
    config: Mapping[str, Any],
    *,
    file: str,
    key: str,
) -> Case:
    """Write a case as the goldens are: outputs of ``reference``, and norms of the gradient of its losses.

    Args:
        folder: of the case; its last part is the case's name.
        weights: in the authors' names.
        inputs: recorded inputs and draws.
        reference: weights -> outputs; those whose names begin with "loss" are summed for the gradient.
        config: the authors' keys.
        file: name of the file of weights.
        key: where it holds them.
    """
    folder.mkdir(parents=True)
    leaves = {name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in weights.items()}
    outputs = reference(leaves)
    losses = [value for name, value in outputs.items() if name.startswith("loss")]
    if losses:
        torch.stack(losses).sum().backward()
        norms = {n: 0.0 if p.grad is None else float(p.grad.norm()) for n, p in leaves.items() if p.is_floating_point()}
        (folder / "grad_norms.json").write_text(json.dumps(norms))
    torch.save({key: weights}, folder / file)
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
    save_file({n: t.detach().clone().contiguous() for n, t in outputs.items()}, folder / "outputs.safetensors")
    (folder / "config_values.json").write_text(json.dumps(dict(config)))
    (folder / "case.json").write_text(json.dumps({"name": folder.name}))
    return Case(folder)


def verdict(case: Case) -> Verdict:
    """Run a case as scripts/check_goldens.py does, and, if it is of a downstream task, through that, too."""
    adapter = next(one for pattern, one in ADAPTERS.items() if re.fullmatch(pattern, case.name))
    found = run_case(case, adapter)[1]
    if found.passed:
        golden_tasks.check(case, case.folder)
    return found
