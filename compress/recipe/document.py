"""YAML that records where each value was written, so that an error can name the file and the line.

Plain scalars follow the YAML 1.2 core schema: ``1e-4`` is a number, ``on`` and ``2024-01-01`` are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from compress.errors import RecipeError, UserError
from compress.problem import Location, show
from compress.registry import suggest

_CONSTANTS = {"null": None, "~": None, "": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?[0-9]{1,400}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)")
_KINDS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in _KINDS}
_STEP = re.compile(r"([^.\[\]]+)|\[([0-9]+)\]")
_MAX_VALUES = 100_000


@dataclass(frozen=True)
class Document:
    """Plain data, with the origin of the value at each path (``recipe.yaml:12`` or ``--set``)."""

    data: Any
    origins: Mapping[Location, str]

    def where(self, location: Sequence[str | int]) -> str:
        """Return the origin of the value at ``location``, or of the closest enclosing value."""
        location = tuple(location)
        while location and location not in self.origins:
            location = location[:-1]
        return self.origins.get(location, "recipe")


def read_document(path: Path) -> Document:
    """Read a YAML file. Raise RecipeError for repeated keys, tags, keys that are not text and endless aliases."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory, not a recipe file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    return parse_document(text, str(path))


def parse_document(text: str, name: str) -> Document:
    """Parse YAML text. Errors give ``name`` before the line number."""
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except RecursionError:
        raise RecipeError(f"{name}: not valid YAML: brackets are nested too deeply") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", "cannot be read")
        raise RecipeError(f"{name}{line}: not valid YAML: {reason}") from None
    if node is None:
        raise RecipeError(f"{name}: the file is empty; a recipe starts with 'version: 1'")
    return _Builder(name).document(node)


class _Builder:
    def __init__(self, name: str) -> None:
        self.name = name
        self.origins: dict[Location, str] = {}
        self.open: list[Node] = []

    def document(self, node: Node) -> Document:
        data = self.value(node, ())
        return Document(data, self.origins)

    def fail(self, node: Node, text: str) -> NoReturn:
        raise RecipeError(f"{self.name}:{node.start_mark.line + 1}: {text}")

    def value(self, node: Node, location: Location) -> Any:
        if node in self.open or len(self.origins) > _MAX_VALUES:
            self.fail(node, "an alias expands without end")
        if node.tag not in _TAGS:
            self.fail(node, f"YAML tag {node.tag!r} is not allowed in a recipe")
        self.origins.setdefault(location, f"{self.name}:{node.start_mark.line + 1}")
        self.open.append(node)
        try:
            if isinstance(node, MappingNode):
                return dict(self.pairs(node, location))
            if isinstance(node, SequenceNode):
                return [self.value(item, (*location, index)) for index, item in enumerate(node.value)]
            assert isinstance(node, ScalarNode)
            return node.value if node.style else _plain(node.value)
        finally:
            self.open.pop()

    def pairs(self, node: MappingNode, location: Location) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self.fail(key_node, "a key must be text")
            key, line = key_node.value, key_node.start_mark.line + 1
            inside = (*location, key)
            if key in seen:
                self.fail(key_node, f"{show(inside)} is given twice (first on line {seen[key]})")
            seen[key] = line
            self.origins[inside] = f"{self.name}:{line}"
            yield key, self.value(value_node, inside)


def _plain(text: str) -> Any:
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return text


def write_document(data: Any, base: Path) -> str:
    """Return plain data as YAML text. The first line names the directory that relative paths start from."""
    stream = StringIO()
    YAML().dump(data, stream)
    return f"# As run. Relative paths start from {base.resolve()}\n{stream.getvalue()}"


def override(document: Document, settings: Sequence[str]) -> Document:
    """Apply ``path=value`` settings. A list item is chosen by index (``stages[1]``) or by name (``stages.small``)."""
    data, origins = deepcopy(document.data), dict(document.origins)
    for setting in settings:
        path, equals, text = setting.partition("=")
        steps = [name or int(index) for name, index in _STEP.findall(path)]
        if not equals or not steps or show(steps) != path.strip():
            raise UserError(f"--set {setting}: write it as path=value, such as stages[1].train.steps=10")
        value = parse_document(text, f"--set {path}").data if text.strip() else None
        location = _assign(data, steps, value, setting)
        origins = {at: origin for at, origin in origins.items() if at[: len(location)] != location}
        origins[location] = "--set"
    return Document(data, origins)


def _assign(data: Any, steps: Sequence[str | int], value: Any, setting: str) -> Location:
    location: Location = ()
    for depth, step in enumerate(steps):
        key = _key(data, step, setting, show(location))
        location = (*location, key)
        if depth == len(steps) - 1:
            data[key] = value
        elif isinstance(data, dict):
            data = data.setdefault(key, {})
        else:
            data = data[key]
    return location


def _key(data: Any, step: str | int, setting: str, at: str) -> str | int:
    if isinstance(data, dict):
        return str(step)
    if not isinstance(data, list):
        raise UserError(f"--set {setting}: {at} is {data!r}, which has nothing inside; to replace it, set {at}=...")
    if str(step).isdigit():
        if int(step) < len(data):
            return int(step)
        raise UserError(f"--set {setting}: {at} has {len(data)} items, counted from 0")
    names = [str(item.get("name") or item.get("type")) if isinstance(item, dict) else str(item) for item in data]
    if names.count(str(step)) != 1:
        raise UserError(f"--set {setting}: {at} has no single item named {step!r}. {suggest(step, names)}")
    return names.index(str(step))
