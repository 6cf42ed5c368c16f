"""Command-line flags over a recipe: `--model.fusion.kind single_stream --objectives.mlm.mask-probability 0.3`.

tyro turns unions and optional parts into subcommands and cannot add entries to a dict, so dotted flags are read here,
against the same slots that recipes are merged by, and end in the same single validation: a flag and a recipe line fail
in the same words.
"""

import argparse
import difflib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from vlp.config import C, ConfigError, Layer, Slot, Tree, load_recipe, members, slots
from vlp.recipes import Migrate, from_yaml

SOURCE = "command line"
_NONE = ("none", "null")


def from_command_line(
    cls: type[C],
    argv: Sequence[str],
    recipe: str | Path | None = None,
    *,
    prog: str = "vlp",
    description: str = "",
    group: str = "",
    migrate: Migrate | None = None,
    below: Sequence[Layer] = (),
) -> C:
    """The configuration that a recipe and flags give; `-h` or `--help` prints it instead and exits with 0.

    Values: `--a.b-c value` or `--a.b-c=value`; booleans also `--x` and `--no-x`; lists as several values or as a YAML
    list. `--model.decoder.kind causal` creates, `--objectives.mim.kind mim` adds, `--objectives.mim none` removes. A
    change of kind goes before the other flags wherever it stands, and starts from the new kind's defaults.

    Args:
        cls: the class of the tree's root.
        argv: the flags alone, without program, command and recipe.
        recipe: its name or file, as for `find_recipe`; None for the defaults.
        prog: the command, for the help.
        description: what it does, for the help.
        group: the folder of shipped recipes that a short name means.
        migrate: lifts a recipe of an older format.
        below: layers that the recipe is laid over, such as what a checkpoint says.

    Raises:
        ConfigError: with all problems of recipe and flags.
        SystemExit: with 0, after the help.
    """
    tree = Tree(cls)
    for layer in (*below, *(load_recipe(recipe, group=group, migrate=migrate) if recipe is not None else ())):
        tree.add(layer)
    wants_help, flags = _split(argv, tree)
    # A flag needs the classes above it settled: parents before parts, and a part's kind before its other fields.
    for flag in sorted(flags, key=lambda flag: (len(flag.path), flag.path[-1] != "kind")):
        _apply(tree, flag)
    if wants_help:
        sys.stdout.write(help_text(tree, prog, description))
        raise SystemExit(0)
    return tree.build()


@dataclass
class _Flag:
    path: tuple[str, ...]
    values: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"--{'.'.join(self.path)}"


class _UnknownFlagError(Exception):
    """No field has this path; the text is the remedy."""


def _split(argv: Sequence[str], tree: Tree[Any]) -> tuple[bool, list[_Flag]]:
    """Whether help is asked for, and the flags with their values. A value may begin with one dash, not with two."""
    wants_help = False
    flags: list[_Flag] = []
    for word in argv:
        if word in ("-h", "--help"):
            wants_help = True
        elif word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flags.append(_Flag(tuple(name.split(".")), [value] if equals else []))
        elif flags:
            flags[-1].values.append(word)
        else:
            tree.problems.append(f"{word}: should be a flag such as --seed 1; --help lists them ({SOURCE})")
    return wants_help, flags


def _apply(tree: Tree[Any], flag: _Flag) -> None:
    """Add a flag to the tree as a layer of one setting; a flag that has no place or no value is a problem."""
    try:
        path, slot = _locate(tree, flag.path)
        values = flag.values
    except _UnknownFlagError as error:
        try:  # is it --no-x?
            path, slot = _locate(tree, (*flag.path[:-1], flag.path[-1].removeprefix("no-")))
            if flag.path[-1][:3] != "no-" or bool not in members(slot.annotation) or flag.values:
                raise _UnknownFlagError
            values = ["false"]
        except _UnknownFlagError:
            tree.problems.append(f"{flag}: {error} ({SOURCE})")
            return
    try:
        value = _value(slot, values, path)
    except ValueError as error:
        tree.problems.append(f"{flag}{' = ' if values else ''}{' '.join(values)}: {error} ({SOURCE})")
        return
    for name in reversed(path):
        value = {name: value}
    tree.add(Layer(value, SOURCE))


def _locate(tree: Tree[Any], parts: Sequence[str]) -> tuple[tuple[str, ...], Slot]:
    """The path of the field that a flag names, hyphens or underscores, and what it may hold."""
    slot, value, path = tree.root, tree.values, ()  # type: Slot, Any, tuple[str, ...]
    beside: Any = None  # what the value is an entry of
    for part in parts:
        as_typed = slot.entry and (not slot.entry.classes or (isinstance(value, Mapping) and part in value))
        name = part if as_typed else part.replace("-", "_")
        if slot.entry:
            slot = slot.entry
        elif slot.classes and name == "kind" and part is parts[-1]:
            return (*path, name), _KIND
        elif slot.classes and (isinstance(value, Mapping) or "" in slot.classes):
            cls = slot.class_of(value or {})  # of a group without kinds the first flag creates what is not there
            if cls is None:  # an unknown kind, which will be reported; what is below it cannot be judged
                return (*path, name), _KIND
            if name not in slots(cls):
                raise _UnknownFlagError(f"unknown flag; {_nearest(tree, parts, path, slots(cls))}")
            slot = slots(cls)[name]
        elif slot.classes:
            shown = _dotted(path)
            kinds = "{" + ",".join(slot.classes) + "}"
            there = [one for one, value in (beside or {}).items() if isinstance(value, Mapping)]
            near = [] if path[-1] in slot.classes else _closest(path[-1], there)
            near = [_dotted((*path[:-1], one, *parts[len(path) :])) for one in near]
            hint = "".join(f"perhaps you meant {one}, or " for one in near)
            raise _UnknownFlagError(f"there is no {'.'.join(path)}; {hint}create it with {shown}.kind {kinds}")
        else:
            raise _UnknownFlagError(f"unknown flag; {'.'.join(path)} is one value; write {_dotted(path)} VALUE")
        beside, path = value, (*path, name)
        value = value.get(name) if isinstance(value, Mapping) else None
    return path, slot


_KIND = Slot(str, {}, None, nullable=False, plain=True)


def _nearest(tree: Tree[Any], parts: Sequence[str], path: Sequence[str], fields: Iterable[str]) -> str:
    """The remedy for a misspelt flag.

    The same name elsewhere in the tree; else a field of the part at `path`, up to which the flag is right; else a flag
    that is very like it, one whose last word is like its own, or one that is somewhat like it.
    """
    given = ".".join(parts).replace("_", "-").lower()
    known = [row.flag.removeprefix("--") for row in _rows(tree.root, tree.values)]
    ends = {name: name.rpartition(".")[2] for name in known}
    last = _closest(given.rpartition(".")[2], set(ends.values()))
    near = (
        [name for name in known if name.endswith(f".{given}")]
        or _beside(tree, parts, len(path), fields)
        or _closest(given, known)
        or [name for name in known if ends[name] in last][:3]
        or _closest(given, known, cutoff=0.6)
    )
    if near:
        return f"perhaps you meant {' or '.join(f'--{name}' for name in near)}"
    return "--help lists all flags"


def _beside(tree: Tree[Any], parts: Sequence[str], at: int, fields: Iterable[str]) -> list[str]:
    """The flag with its word number `at` corrected to the nearest of some fields, if that makes it a real one."""
    for name in _closest(parts[at].replace("-", "_").lower(), fields):
        try:
            return [_dotted(_locate(tree, (*parts[:at], name, *parts[at + 1 :]))[0]).removeprefix("--")]
        except _UnknownFlagError:
            continue
    return []


def _closest(word: str, names: Iterable[str], cutoff: float = 0.8) -> list[str]:
    """The name most like a word, one of the same letters first: letters that changed places are the commonest slip."""
    names = sorted(names)
    swapped = [name for name in difflib.get_close_matches(word, names) if sorted(name) == sorted(word)]
    return swapped[:1] or difflib.get_close_matches(word, names, n=1, cutoff=cutoff)


def _value(slot: Slot, words: Sequence[str], path: tuple[str, ...]) -> Any:
    """What the words after a flag mean for a slot; words that fit nothing go on, for the validation to report."""
    if not words:
        if bool in members(slot.annotation):
            return True
        raise ValueError(f"needs a value, {metavar(slot.annotation)}")
    if (slot.classes or slot.entry) and not slot.plain:
        word = words[0]
        value = None if word.lower() in _NONE else _scalar(word)
        if len(words) == 1 and (value is None or isinstance(value, dict)):
            return value
        kinds = [kind for kind in slot.classes if kind]
        if word in kinds:
            raise ValueError(f"is a group of settings; write {_dotted(path)}.kind {word}")
        raise ValueError(f"is a group of settings; set them one by one, {_dotted(path)}.NAME VALUE")
    candidates: list[Any] = []
    if len(words) == 1:
        parsed = _scalar(words[0])
        candidates = [None] if words[0].lower() in _NONE else []
        candidates += [words[0]] if isinstance(parsed, str) else [parsed, words[0]]
    candidates += [[_scalar(word) for word in words], list(words)]
    adapter: TypeAdapter[Any] = TypeAdapter(slot.annotation)
    for candidate in candidates:
        try:
            adapter.validate_python(candidate)
        except ValidationError:
            continue
        return candidate
    return words[0] if len(words) == 1 else list(words)


def _scalar(word: str) -> Any:
    try:
        return from_yaml(word)
    except yaml.YAMLError:
        return word  # a glob such as *.tar, or any other text


def _dotted(path: Sequence[str]) -> str:
    return f"--{'.'.join(path).replace('_', '-')}"


@dataclass(frozen=True)
class _Row:
    """A line of the help: flag, what it takes, docstring, present value as shown; its section with its text."""

    flag: str
    takes: str
    doc: str
    value: str
    section: tuple[str, ...]
    about: str = ""


def _rows(slot: Slot, value: Any, path: tuple[str, ...] = (), doc: str = "") -> Iterator[_Row]:
    """The flags of the part at `path`: its kind, its plain fields, then its parts."""
    flag = _dotted(path)
    kinds = "{" + ",".join(kind for kind in slot.classes if kind) + "}"
    if slot.entry:
        names = ",".join(kind for kind in slot.entry.classes if kind)
        first, takes = ("kind", f"{{{names}}}") if names else ("FIELD", "VALUE")
        yield _Row(f"{flag}.NAME.{first}", takes, f"Add one. `{flag}.NAME none` removes.", "", path, doc)
        for name, each in value.items() if isinstance(value, Mapping) else ():
            yield from _rows(slot.entry, each, (*path, name))
        return
    if "" not in slot.classes:
        shown = value.get("kind", _REQUIRED) if isinstance(value, Mapping) else value
        yield _Row(f"{flag}.kind", kinds, doc, _shown(shown), path)
    cls = slot.class_of(value)
    if cls is None:
        return
    about = inspect.cleandoc(cls.__doc__).splitlines()[0] if cls.__doc__ else doc
    parts = []
    for name, info in cls.model_fields.items():
        inner, present, help_ = slots(cls)[name], value.get(name, _REQUIRED), info.description or ""
        if inner.classes or (inner.entry and inner.entry.classes):
            parts.append((inner, present, (*path, name), help_))
        elif name != "kind":
            yield _Row(_dotted((*path, name)), metavar(inner.annotation), help_, _shown(present), path, about)
    for part in parts:
        yield from _rows(*part)


_REQUIRED = object()


def _shown(value: Any) -> str:
    if value is _REQUIRED:
        return "required"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value)) or "empty"
    return str(value) if str(value) else "empty"


def metavar(annotation: Any) -> str:
    """What a value of a type looks like, for the help: `INT`, `{full,causal}`, `FLOAT ...`, `PATH|none`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    alternatives = members(annotation)
    if len(alternatives) > 1:
        return "|".join(dict.fromkeys(metavar(each) for each in alternatives))
    annotation = alternatives[0]
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin in (list, tuple, set, frozenset, Sequence):
        inner = dict.fromkeys(metavar(each) for each in arguments if each is not Ellipsis)
        return f"{'|'.join(inner)} ..."
    if annotation is type(None):
        return "none"
    if annotation is bool:
        return "{true,false}"
    return getattr(origin or annotation, "__name__", "value").upper()


def help_text(tree: Tree[Any], prog: str, description: str = "") -> str:
    """The help of a command: every flag of the tree as it now stands, with its docstring and its value.

    Args:
        tree: the merged settings; the fields of a kind are listed where that kind is chosen.
        prog: the command with its recipe.
        description: what the command does.
    """
    parser = argparse.ArgumentParser(
        prog,
        usage=f"{prog} [--FLAG VALUE ...]".replace("%", "%%"),
        description=description.replace("%", "%%"),
        epilog="Choose another kind in front of --help to see its fields.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=48, width=120),
        add_help=False,
    )
    groups = {"": parser.add_argument_group("general")}
    groups[""].add_argument("-h", "--help", action="store_true", help="Show this and exit.")
    for row in _rows(tree.root, tree.values):
        title = ".".join(row.section)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].description = groups[title].description or row.about.replace("%", "%%")
        value = f"({row.value})" if row.value == "required" else f"(default: {row.value})" if row.value else ""
        text = f"{inspect.cleandoc(row.doc)} {value}".strip()
        groups[title].add_argument(row.flag, metavar=row.takes, help=text.replace("%", "%%"))
    return parser.format_help()


__all__ = ["ConfigError", "from_command_line", "help_text", "metavar"]
