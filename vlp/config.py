"""Configuration: frozen pydantic models, merged from defaults, recipes and flags, with errors a user can act on.

A configuration class stands in the file of what it builds. Alternatives carry a literal field `kind`, and the folder
that owns them writes out their union:

    class PatchConfig(Config):
        kind: Literal["patch"] = "patch"
        depth: int = 12
        '''Number of transformer blocks.'''

    VisionConfig = Annotated[PatchConfig | GridConfig, Field(discriminator="kind")]

Layers are merged as plain trees: a mapping whose kind changes starts from the new kind's defaults; in a
`dict[str, ...]` of configurations an entry's kind defaults to its key; `null` or `none` removes such an entry, or an
optional part.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from vlp.recipes import (
    FORMAT,
    ConfigError,
    Layer,
    Migrate,
    configs_folder,
    did_you_mean,
    dump_yaml,
    find_recipe,
    lift,
    list_recipes,
    load_recipe,
)

__all__ = [
    "FORMAT",
    "Config",
    "ConfigError",
    "Layer",
    "Tree",
    "build",
    "configs_folder",
    "find_recipe",
    "leaves",
    "list_recipes",
    "load",
    "load_recipe",
    "restated",
    "to_yaml",
]


class Config(BaseModel):
    """Base of all configuration classes: frozen, no unknown fields; the string below a field is its help.

    No computed fields (the written tree could not be read back); derive values in properties.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants", validate_default=True
    )

    def over(self, below: "Config | None") -> Self:
        """Return ``below`` with all that is stated of this; this itself where that is of another class."""
        stated = {name: getattr(self, name) for name in self.model_fields_set}
        return below.model_copy(update=stated) if type(below) is type(self) else self


C = TypeVar("C", bound=Config)
Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """What a field, or an entry of a dict field, may hold.

    Attributes:
        annotation: its type.
        classes: configuration classes by kind; the key is "" for a class without `kind`. Empty for plain values.
        entry: what the entries of a dict may hold; None if it is no dict.
        nullable: None is a value.
        plain: it may hold something besides configurations, a dict and None.
    """

    annotation: Any
    classes: Mapping[str, type[Config]]
    entry: "Slot | None"
    nullable: bool
    plain: bool

    def class_of(self, value: Any) -> type[Config] | None:
        """The class that a mapping belongs to by its kind; None if its kind is unknown or it is no mapping."""
        kind = value.get("kind", "") if isinstance(value, Mapping) else None
        return self.classes.get("" if "" in self.classes else kind) if isinstance(kind, str) else None


def members(annotation: Any) -> list[Any]:
    """The alternatives of a type, looking through `Annotated`, `Union` and `|`."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for argument in get_args(annotation) for member in members(argument)]
    return [annotation]


def slot_of(annotation: Any) -> Slot:
    """The slot that a type describes."""
    alternatives = members(annotation)
    configs = [each for each in alternatives if isinstance(each, type) and issubclass(each, Config)]
    classes = {kind: each for each in configs for kind in _kinds(each)}
    assert len(classes) == sum(len(_kinds(each)) for each in configs), f"two classes of {annotation} share a kind"
    dicts = [each for each in alternatives if get_origin(each) in (dict, Mapping)]
    entry = slot_of(get_args(dicts[0])[1]) if dicts else None
    nullable = NoneType in alternatives or Any in alternatives
    groups = len(configs) + len(dicts) + (NoneType in alternatives)
    return Slot(annotation, classes, entry, nullable, plain=len(alternatives) > groups)


@cache
def slots(cls: type[Config]) -> dict[str, Slot]:
    """The slot of each field of a class."""
    return {name: slot_of(field.annotation) for name, field in cls.model_fields.items()}


def _kinds(cls: type[Config]) -> tuple[str, ...]:
    field = cls.model_fields.get("kind")
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ("",)


def defaults(cls: type[Config]) -> dict[str, Any]:
    """The tree of a class's defaults; a required part that has no alternatives is filled with its own."""
    tree: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        slot = slots(cls)[name]
        if not field.is_required():
            tree[name] = _plain(field.get_default(call_default_factory=True))
        elif len(slot.classes) == 1 and not slot.nullable and not slot.plain:
            tree[name] = defaults(next(iter(slot.classes.values())))
        elif name == "kind" and len(_kinds(cls)) == 1:
            tree[name] = _kinds(cls)[0]
    return tree


def _plain(value: Any) -> Any:
    """Configurations as mappings, all other values as they are."""
    if isinstance(value, Config):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, dict) else value


class Tree(Generic[C]):
    """The settings of a class while layers are laid over one another, the source of each, and what is wrong."""

    def __init__(self, cls: type[C]) -> None:
        self.cls = cls
        self.root = Slot(cls, {"": cls}, None, nullable=False, plain=False)
        self.values: dict[str, Any] = defaults(cls)
        self.problems: list[str] = []
        self._sources: dict[Path_, str] = {}

    def add(self, layer: Layer) -> None:
        """Lay a layer over what is there. Its mistakes are found here or in `build`, which reports them."""
        self.values = self._merge(self.root, self.values, layer.tree, (), layer.source)

    def build(self) -> C:
        """The validated configuration.

        Raises:
            ConfigError: with all problems of all layers.
        """
        config = self._construct(self.cls, self.values, ())
        if self.problems:
            raise ConfigError(self.problems)
        return config

    def report(self, path: Path_, value: str, message: str) -> None:
        """Note a problem in one line: dotted path, value as shown, what to do, source of the nearest setting."""
        at = path
        while at and at not in self._sources:
            at = at[:-1]
        source = self._sources.get(at, "")
        shown = ".".join(path) + (f" = {value}" if value else "")
        line = f"{shown}: {message}" if shown else message
        self.problems.append(" ".join(line.split()) + (f" ({source})" if source else ""))

    def _merge(self, slot: Slot, below: Any, above: Any, path: Path_, source: str, key: str | None = None) -> Any:
        """`above` laid over `below`; `key` is the kind that an entry of a dict has if it states none."""
        self._sources[path] = source
        if slot.classes and above == "none" and not slot.plain:
            above = None
        if not isinstance(above, Mapping):
            return above
        result = dict(below) if isinstance(below, Mapping) else {}
        inner: Mapping[str, Slot] = {}
        if slot.classes and "" not in slot.classes:
            # A part that may be absent has no default to take the kind from: it is of the first one, as it was when
            # that was the only one.
            first = next(iter(slot.classes)) if len(slot.classes) == 1 or slot.nullable else None
            kind = above.get("kind", result.get("kind", key if key in slot.classes or not first else first))
            if kind != result.get("kind"):
                cls = slot.class_of({"kind": kind})
                result = defaults(cls) if cls else {}
            result = result if kind is None else {**result, "kind": kind}
        elif slot.classes and not result:
            result = defaults(slot.classes[""])
        elif slot.entry is None and not slot.classes:
            return above
        if (cls := slot.class_of(result)) is not None:
            inner = slots(cls)
        for name, value in ((str(name), value) for name, value in above.items()):
            at = (*path, name)
            entry = slot.entry or inner.get(name)
            removed = value is None or (
                value == "none" and entry is not None and bool(entry.classes) and not entry.plain
            )
            if slot.entry and removed and not slot.entry.nullable:
                self._remove(result, at, source)
            elif entry is None:
                self._sources[at], result[name] = source, value
            else:
                result[name] = self._merge(entry, result.get(name), value, at, source, name if slot.entry else None)
        return result

    def _remove(self, entries: dict[str, Any], path: Path_, source: str) -> None:
        if path[-1] in entries:
            del entries[path[-1]]
        else:
            self._sources[path] = source
            there = f"there are {', '.join(entries)}" if entries else "there are none"
            self.report(path, "none", f"nothing to remove, {there}; to add it write {{}} for its defaults")

    def _construct(self, cls: type[Config], tree: Mapping[str, Any], path: Path_) -> Any:
        """An object of `cls`, or `_FAILED`; its parts come first, so that each problem is found at its own path."""
        values: dict[str, Any] = {}
        for name, value in ((str(name), value) for name, value in tree.items()):
            if name in slots(cls):
                values[name] = self._value(slots(cls)[name], value, (*path, name))
            else:
                hint = did_you_mean(name, cls.model_fields, otherwise="the fields here are")
                self.report((*path, name), _show(value), f"unknown field; {hint}")
        plain = defaults(cls)  # left out, so that `model_fields_set` is what layers say
        stated = {n: value for n, value in values.items() if (*path, n) in self._sources or tree[n] != plain.get(n)}
        try:
            config = cls.model_validate(stated)
        except ValidationError as error:
            self._translate(error, values, path)
            return _FAILED
        return config if len(values) == len(tree) else _FAILED

    def _value(self, slot: Slot, value: Any, path: Path_) -> Any:
        if slot.entry and isinstance(value, Mapping):
            entries = {name: self._value(slot.entry, each, (*path, str(name))) for name, each in value.items()}
            return _FAILED if any(each is _FAILED for each in entries.values()) else entries
        if not slot.classes or (value is None and slot.nullable) or (slot.plain and not isinstance(value, Mapping)):
            return value
        if (cls := slot.class_of(value)) is not None:
            return self._construct(cls, value, path)
        kinds = [kind for kind in slot.classes if kind]
        known = f"; known kinds are {', '.join(kinds)}" if kinds else ""
        if not isinstance(value, Mapping):
            self.report(path, _show(value), f"should be a mapping of its settings{known}")
        elif "kind" not in value:
            self.report((*path, "kind"), "", f"is required{known}")
        else:
            near = did_you_mean(str(value["kind"]), kinds)
            self.report(
                (*path, "kind"), _show(value["kind"]), f"unknown kind; {near}{known if 'perhaps' in near else ''}"
            )
        return _FAILED

    def _translate(self, error: ValidationError, values: Mapping[str, Any], path: Path_) -> None:
        """Note pydantic's problems, those of one path (a union has one for each alternative) joined to one."""
        found: dict[Path_, tuple[Any, list[str]]] = {}
        for item in error.errors(include_url=False):
            value, at = dict(values), path  # type: Any, Path_
            for part in item["loc"]:  # parts that are not in the input are pydantic's names of a union's alternatives
                inside = isinstance(value, Mapping) and part in value
                if inside or (isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)):
                    value, at = value[part], (*at, str(part))
            if value is _FAILED:
                continue
            if item["type"] in ("missing", "extra_forbidden"):
                at = at if at[-1:] == (str(item["loc"][-1]),) else (*at, str(item["loc"][-1]))
            shown = "" if item["type"] == "missing" or not item["loc"] else _show(value)
            found.setdefault(at, (shown, []))[1].append(_message(item, at))
        for at, (shown, messages) in found.items():
            self.report(at, shown, " or ".join(dict.fromkeys(messages)))


_FAILED = object()  # stands where a part could not be built; no field of a configuration type accepts it


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _message(item: Any, path: Path_) -> str:
    if item["type"] == "missing":
        flag = ".".join(path).replace("_", "-")
        return f"is required; set it in the recipe or with --{flag} VALUE"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = re.sub(r"\bInput should\b", "should", message)
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        near = did_you_mean(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]), otherwise="")
        message += f"; {near}" if near.startswith("perhaps") else ""
    return message


def build(cls: type[C], *layers: Layer | Mapping[str, Any], migrate: Migrate | None = None) -> C:
    """Merge layers over the defaults of `cls`, lowest first, and validate once.

    Args:
        cls: the class of the tree's root.
        layers: what `load_recipe` gave, or trees.
        migrate: lifts a tree of an older format.

    Raises:
        ConfigError: with all problems at once.
    """
    tree = Tree(cls)
    for layer in layers:
        layer = layer if isinstance(layer, Layer) else Layer(layer)
        tree.add(Layer(lift(layer.tree, layer.source, migrate), layer.source))
    return tree.build()


def load(cls: type[C], recipe: str | Path, *, group: str = "", migrate: Migrate | None = None) -> C:
    """The configuration of a recipe: its name or file, as for `find_recipe`.

    Raises:
        ConfigError: as `load_recipe` and `build`.
    """
    return build(cls, *load_recipe(recipe, group=group, migrate=migrate))


def to_yaml(config: Config) -> str:
    """The whole resolved tree as a recipe, `format` first, that loads to an equal configuration."""
    tree = config.model_dump(mode="json")
    merged = Tree(type(config))
    merged.add(Layer(tree))
    return dump_yaml({"format": FORMAT, **_with_removals(tree, merged.values)})


def _with_removals(tree: dict[str, Any], merged: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with a null for each entry that a class has by default and the configuration does not."""
    gone = {name: None for name in merged if name not in tree}
    inner = {
        name: _with_removals(value, merged[name])
        if isinstance(value, dict) and isinstance(merged[name], Mapping)
        else value
        for name, value in tree.items()
    }
    kind = {"kind": tree["kind"]} if "kind" in tree else {}  # the line to read first
    return kind | inner | gone


def restated(cls: type[Config], recipe: str | Path) -> list[str]:
    """Dotted paths of a recipe's lines without which it would be the same.

    Raises:
        ConfigError: the recipe has mistakes.
    """
    *bases, own = load_recipe(recipe)
    whole = build(cls, *bases, own)
    superfluous = []
    for path, _ in _leaves(own.tree):
        with suppress(ConfigError):
            if build(cls, *bases, Layer(_without(own.tree, path), own.source)) == whole:
                superfluous.append(".".join(map(str, path)))
    return superfluous


def leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting of a tree by its dotted name."""
    return {".".join(map(str, path)): value for path, value in _leaves(tree)}


def _leaves(tree: Mapping[str, Any], path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _without(tree: Mapping[str, Any], path: Path_) -> dict[str, Any]:
    head, *rest = path
    if not rest:
        return {name: value for name, value in tree.items() if name != head}
    return {**tree, head: _without(tree[head], tuple(rest))}
