from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from compress import registry
from compress.errors import RecipeError
from compress.measure.metrics.metric import Figure, Metric
from compress.registry import MEASUREMENTS, METRICS, QUANTIZERS, STAGES, TERMS, Registry, suggest
from compress.schema import Strict
from compress.surgery.quantization.methods import Method
from compress.surgery.quantization.spec import WeightQuantization

ALL = [(kind, name) for kind in (STAGES, TERMS, MEASUREMENTS) for name in kind.names()]


class Added(Strict):
    """What another distribution adds."""

    type: str = "added"


@pytest.mark.parametrize(("kind", "name"), ALL, ids=[name for _, name in ALL])
def test_every_builtin_name_is_a_documented_strict_class(kind: Registry, name: str) -> None:
    found = kind.get(name)
    assert issubclass(found, Strict)
    assert (found.__doc__ or "").strip()
    assert found.model_fields["type"].default in (name, None) or found.model_fields["type"].is_required()


@pytest.mark.parametrize("name", QUANTIZERS.names())
def test_every_builtin_quantizer_is_a_method(name: str) -> None:
    assert isinstance(QUANTIZERS.get(name), Method)


@pytest.mark.parametrize("name", METRICS.names())
def test_every_builtin_metric_is_a_documented_function_with_declared_figures(name: str) -> None:
    metric = METRICS.get(name)
    assert isinstance(metric, Metric)
    assert (metric.function.__doc__ or "").strip()
    assert metric.figures and all(isinstance(figure, Figure) for figure in metric.figures.values())
    assert metric.version == 1, "built-in metrics have the version of the quality measurement"


def test_an_unknown_quantizer_is_reported_with_the_known_ones() -> None:
    with pytest.raises(
        ValidationError, match=r"unknown quantizer 'lsqq'\. Did you mean 'lsq'\? Known: dynamic_scaling"
    ):
        WeightQuantization(bits=4, method="lsqq")


@pytest.mark.parametrize(
    ("name", "text"), [("prun", "Did you mean 'prune'?"), ("xyz", "Known: finetune"), (3, "Known:")]
)
def test_an_unknown_name_is_reported_with_the_known_ones(name: object, text: str) -> None:
    with pytest.raises(RecipeError, match="unknown stage") as caught:
        STAGES.get(name)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_suggest_lists_what_is_known() -> None:
    assert suggest("speeed", ["size", "speed"]) == "Did you mean 'speed'? Known: size, speed"
    assert suggest("other", []) == "Known: none"


def test_read_takes_a_mapping_a_bare_name_or_what_is_already_read() -> None:
    term = TERMS.read({"type": "adaptive_kl", "head_mass": 0.25})
    assert (term.type, term.head_mass) == ("adaptive_kl", 0.25)
    assert TERMS.read("adaptive_kl").type == "adaptive_kl"
    assert TERMS.read(term) is term


def test_read_keeps_the_path_to_a_wrong_field() -> None:
    with pytest.raises(ValidationError) as caught:
        TERMS.read({"type": "adaptive_kl", "head_mass": "much"})
    assert caught.value.errors()[0]["loc"] == ("head_mass",)


class _Point:
    name = "added"

    def load(self) -> type[Added]:
        return Added


def test_other_distributions_add_names_but_do_not_replace_built_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def points(**kwargs: Any) -> list[_Point]:
        asked.update(kwargs)
        return [_Point()]

    monkeypatch.setattr(registry, "entry_points", points)
    kind = Registry("stage", "compress.stages", {"built": f"{__name__}:Added"})
    assert kind.names() == ["built", "added"]
    assert kind.get("added") is Added
    assert asked == {"group": "compress.stages"}
