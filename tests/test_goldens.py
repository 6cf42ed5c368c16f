"""What reference code computed comes out here; the adapters between the two name, index and reshape, nothing else."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from scripts.check_goldens import check
from scripts.goldens.base import Case

ROOT = Path(__file__).parent.parent
CASES = sorted(path.parent for path in (ROOT / "tests" / "goldens").glob("*/case.json"))
MATHEMATICS = {
    "addmm", "baddbmm", "bmm", "conv2d", "cosine_similarity", "cross_entropy", "cumsum", "dropout", "einsum", "exp",
    "functional", "gelu", "kl_div", "layer_norm", "linear", "log", "log_softmax", "logsumexp", "matmul", "mm",
    "mse_loss", "nll_loss", "nn", "norm", "normalize", "scaled_dot_product_attention", "sigmoid", "softmax", "sqrt",
    "tanh",
}  # fmt: skip


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_golden(folder: Path) -> None:
    verdict = check(Case(folder))
    assert verdict.passed, verdict.line()
    assert verdict.compared > 0


def test_shared_weights_may_lie_elsewhere(tmp_path: Path) -> None:
    """A case that shares another's weights is whole without it where that is given, too."""
    alone = shutil.copytree(ROOT / "tests" / "goldens" / "uniter_mrc", tmp_path / "uniter_mrc")
    assert not Case(alone).weights.is_file()
    verdict = check(Case(alone, (tmp_path, ROOT / "tests" / "goldens")))
    assert verdict.passed and verdict.compared, verdict.line()


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "goldens").glob("*.py")), ids=lambda path: path.stem)
def test_adapters_do_no_mathematics(path: Path) -> None:
    if path.stem == "base":  # the comparison itself
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    } | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.startswith("torch.nn")}
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not used & MATHEMATICS
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.MatMult)]
