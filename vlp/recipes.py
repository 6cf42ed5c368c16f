"""Recipe files: YAML text to plain trees, `base:` chains, format versions, and where recipes are found.

The machinery below `vlp.config`; it knows no configuration class.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FORMAT = 1
"""Version of the configuration format; raised with a migration whenever a stored configuration would no longer load."""

Migrate = Callable[[dict[str, Any]], dict[str, Any]]
"""Lifts a tree, its old `format` included, to the present format."""


class ConfigError(ValueError):
    """Everything that is wrong with a configuration.

    Attributes:
        problems: one line each, as joined in the message.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Layer:
    """One source of settings: what it states, and its name in messages (a file, "command line"; empty for none)."""

    tree: Mapping[str, Any]
    source: str = ""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and without silently repeated keys."""


class _Dumper(yaml.SafeDumper):
    """The counterpart: quotes exactly the strings that `_Loader` would read as something else."""


# YAML 1.1, PyYAML's default, reads 1e-4 as a string, `no` as False, 12:30 as 750 and 2026-01-01 as a date.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _name, (_pattern, _first) in _SCALARS.items():
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), _first)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        if isinstance(key, yaml.ScalarNode):
            seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)


def from_yaml(text: str) -> Any:
    """What a YAML text holds; `1e-4` is a number, and only `true` and `false` are booleans.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, Loader=_Loader)


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """The YAML text of a tree of plain values, keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "there are") -> str:
    """The remedy for a wrong name: the nearest known one, else all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"perhaps you meant {near[0]}"
    return f"{otherwise} {', '.join(known)}" if known else "there are none"


def configs_folder() -> Path:
    """The folder of the shipped recipes: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def list_recipes(group: str = "") -> list[str]:
    """Names of the shipped recipes, such as `pretrain/albef`; only those below the folder `group` if it is given."""
    root = configs_folder()
    names = sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    return [name for name in names if name.startswith(f"{group}/")] if group else names


def find_recipe(name: str | Path, group: str = "") -> Path:
    """The file of a recipe.

    Args:
        name: a path that ends in .yaml or .yml, or the name of a shipped recipe, `pretrain/albef` or `albef` for short.
        group: the folder of shipped recipes that a short name means, such as `pretrain`.

    Raises:
        ConfigError: no such recipe, or a short name that several recipes have; the message has the nearest names.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path.resolve()
        beside = sorted(each.name for each in path.parent.glob("*.y*ml"))
        hint = did_you_mean(path.name, beside, otherwise=f"the recipes in {path.parent.as_posix()} are")
        raise ConfigError(f"recipe {path.as_posix()}: no such file; {hint}")
    wanted, known = path.as_posix(), list_recipes()
    exact = [each for each in (f"{group}/{wanted}", wanted) if each in known]
    found = exact[:1] or [each for each in list_recipes(group) if each.rpartition("/")[2] == wanted]
    if len(found) == 1:
        return configs_folder() / f"{found[0]}.yaml"
    if found:
        raise ConfigError(f"recipe {wanted}: {len(found)} recipes have this name; write {' or '.join(found)}")
    names = [each.removeprefix(f"{group}/") if group else each for each in list_recipes(group)]
    by_stem = [each for each in names if each.rpartition("/")[2] in difflib.get_close_matches(wanted, _stems(names))]
    hint = f"perhaps you meant {' or '.join(by_stem)}" if by_stem else did_you_mean(wanted, names)
    raise ConfigError(f"recipe {wanted}: no such recipe; {hint} (a file's name ends in .yaml)")


def _stems(names: Iterable[str]) -> list[str]:
    return [name.rpartition("/")[2] for name in names]


def load_recipe(name: str | Path, *, group: str = "", migrate: Migrate | None = None) -> tuple[Layer, ...]:
    """Read a recipe and what it is based on.

    `base:` is a file beside the recipe (`albef.yaml`, `../common.yaml`) or the name of a shipped recipe.

    Args:
        name: as for `find_recipe`.
        group: as for `find_recipe`.
        migrate: lifts a tree of an older format.

    Returns:
        The layers to merge, lowest base first, the recipe itself last.

    Raises:
        ConfigError: a file is missing, is no YAML mapping, is of another format, or is its own base.
    """
    path: Path | None = find_recipe(name, group)
    chain: list[Path] = []
    layers: list[Layer] = []
    while path is not None:
        if path in chain:
            circle = " -> ".join(display(each) for each in [*chain[chain.index(path) :], path])
            raise ConfigError(f"base: {circle} is a circle; remove one of these base: lines")
        chain.append(path)
        tree = read_tree(path)
        base = tree.pop("base", None)
        layers.append(Layer(lift(tree, display(path), migrate), display(path)))
        path = None if base is None else _find_base(base, path)
    return tuple(reversed(layers))


def _find_base(base: Any, recipe: Path) -> Path:
    if not isinstance(base, str):
        raise ConfigError(f"base = {base!r}: should be one recipe, a file or a name ({display(recipe)})")
    try:
        return find_recipe(recipe.parent / base if base.endswith((".yaml", ".yml")) else base)
    except ConfigError as error:
        raise ConfigError(f"base = {base!r}: {error} ({display(recipe)})") from None


def read_tree(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one.

    Raises:
        ConfigError: the file cannot be read or holds no YAML mapping; the message has file and line.
    """
    source = display(path)
    try:
        tree = from_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read as UTF-8 text: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise ConfigError(f"{source}, {where}: {error.problem or error.context}; correct the YAML there") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {' '.join(str(error).split())}; correct the YAML there") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: holds a {type(tree).__name__}; a recipe is a mapping of names to values")
    return tree


def lift(tree: Mapping[str, Any], source: str = "", migrate: Migrate | None = None) -> dict[str, Any]:
    """`tree` in the present format, without its `format` line; a tree that has none is taken to be of the present one.

    Raises:
        ConfigError: a format newer than `FORMAT`, or an older one and no `migrate`.
    """
    version = tree.get("format", FORMAT)
    where = f" ({source})" if source else ""
    if not isinstance(version, int) or isinstance(version, bool):
        raise ConfigError(f"format = {version!r}: should be a whole number, at present {FORMAT}{where}")
    if version > FORMAT:
        raise ConfigError(f"format = {version}: newer than this vlp, which reads up to {FORMAT}; update vlp{where}")
    if version < FORMAT:
        if migrate is None:
            raise ConfigError(f"format = {version}: older than {FORMAT}; lift it with vlp.checkpoint.migrate{where}")
        tree = migrate(dict(tree))
    return {key: value for key, value in tree.items() if key != "format"}


def display(path: Path) -> str:
    """A path as messages show it: relative where it lies below the working directory."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
