"""Describe everything a recipe may name, from docstrings, the fields of classes and the values of metrics."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from compress.errors import UserError
from compress.measure.figures import figure_of
from compress.measure.metrics.metric import Metric
from compress.measure.table import table
from compress.recipe import Recipe
from compress.registry import MEASUREMENTS, METRICS, STAGES, TERMS, suggest

_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_WORDS = {str: "text", int: "integer", float: "number", bool: "true | false", type(None): "null", Any: "anything"}


def overview() -> RenderableType:
    """Return every stage, term, measurement and metric with the first sentence of its documentation."""
    shown = table("", "name", "what it does")
    for registry in (STAGES, TERMS, MEASUREMENTS, METRICS):
        for position, name in enumerate(registry.names()):
            kind = "" if position else f"[bold]{registry.kind}s[/bold]"
            shown.add_row(
                kind, name, escape(_first_sentence(registry.get(name))), end_section=name == registry.names()[-1]
            )
    return shown


def description(name: str) -> RenderableType:
    """Return documentation, fields, defaults and ranges of the class called ``name`` and of the classes of its fields.

    For a metric, return its documentation and the values that it computes.
    """
    if name in METRICS.names():
        return _metric(name)
    parts: list[RenderableType] = []
    for model in dict.fromkeys(_with_inner(_named(name))):
        title = name if not parts else model.__name__
        fields = table("field", "type", "default", "meaning")
        for key, field in model.model_fields.items():
            fields.add_row(field.alias or key, escape(_type(field)), escape(_default(field)), escape(_meaning(field)))
        parts += [Text(title, style="bold"), Text(_documentation(model)), "", fields, ""]
    return Group(*parts)


def _metric(name: str) -> RenderableType:
    metric: Metric = METRICS.get(name)
    figures = table("figure", "label", "better")
    for key, declared in metric.figures.items():
        better = "(a condition)" if declared.condition else declared.better or "(no direction)"
        figures.add_row(key, escape(figure_of(key, metric.figures).label), better)
    return Group(Text(name, style="bold"), Text(_documentation(metric)), "", figures, "")


def schema(name: str) -> str:
    """Return the JSON schema of the class behind ``name``."""
    if name in METRICS.names():
        raise UserError(f"describe: {name} is a metric and has no fields; its settings are fields of quality")
    return json.dumps(_named(name).model_json_schema(), indent=2)


def _named(name: str) -> type[BaseModel]:
    if name == "recipe":
        return Recipe
    for registry in (STAGES, TERMS, MEASUREMENTS):
        if name in registry.names():
            found: type[BaseModel] = registry.get(name)
            return found
    known = ["recipe", *STAGES.names(), *TERMS.names(), *MEASUREMENTS.names(), *METRICS.names()]
    raise UserError(f"describe: unknown name {name!r}. {suggest(name, known)}")


def _first_sentence(part: type[BaseModel] | Metric) -> str:
    text = " ".join(_documentation(part).split("\n\n")[0].split())
    return re.split(r"(?<! al)\. (?=[A-Z])", text)[0].rstrip(".")


def _documentation(part: type[BaseModel] | Metric) -> str:
    return (inspect.getdoc(part.function if isinstance(part, Metric) else part) or "").replace("``", "")


def _with_inner(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for inner in _models(field.annotation):
            if not hasattr(inner, "run") and inner.__name__ != "LossTerm":  # these have their own descriptions
                yield from _with_inner(inner)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _type(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in _LIMITS.items()
        if hasattr(rule, name)
    ]
    return " ".join([_words(field.annotation), *limits])


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_words(argument) for argument in arguments if argument is not type(None)))
    if origin in (tuple, list):
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return f"mapping of {_words(arguments[0])} to {_words(arguments[1])}"
    return str(_WORDS.get(annotation) or getattr(annotation, "__name__", annotation))


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "(required)" if field.default_factory is None else ""
    return "" if field.default is None else _plain(field.default)


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        given = value.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(({"type": value.type} if hasattr(value, "type") else {}) | given)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").replace("``", "").split())
