"""Figures for notebooks show the numbers that they are given."""

from __future__ import annotations

import doctest
import io
from typing import Any

import matplotlib
import pytest
import torch

import compress
from compress.errors import NothingDoneError, UserError
from compress.training.loop import Trained


def history(steps: int, evaluations: int = 0) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"step": at, "loss": 4.0 / at, "terms": {"kl": 2.0 / at, "l1": 4.0 / at}} for at in range(1, steps + 1)
    ]
    return lines + [{"step": at, "eval_nll": 3.0 + (at - 2) ** 2} for at in range(1, evaluations + 1)]


def lines_of(axes: Any) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def test_training_curves_add_up_to_the_loss() -> None:
    figure = compress.plots.training(Trained(steps=3, history=history(3)), weights={"l1": 0.5})
    found = lines_of(figure.axes[0])
    assert found["total"] == [4.0, 2.0, 4 / 3]
    assert [a + b for a, b in zip(found["kl"], found["l1, weighted 0.5"], strict=True)] == found["total"]
    assert len(figure.axes) == 1


def test_evaluations_have_a_panel_with_the_lowest_marked() -> None:
    figure = compress.plots.training(history(3, evaluations=3))
    assert lines_of(figure.axes[1])["least, step 2"] == [3.0]


def test_the_front_goes_through_the_models_that_no_other_beats() -> None:
    sizes = {"base": (8, 20.0), "worse": (8, 30.0), "small": (1, 25.0)}
    records = [{"name": n, "bytes": b * 2**20, "quality": {"perplexity": p}} for n, (b, p) in sizes.items()]
    axes = compress.plots.pareto([*records, {"name": "unmeasured"}]).axes[0]
    front, *points = axes.get_lines()
    assert (list(front.get_xdata()), list(front.get_ydata())) == ([1.0, 8.0], [25.0, 20.0])
    assert {text.get_text() for text in axes.texts} == set(sizes)
    assert len(points) == 3


@pytest.mark.parametrize(
    ("metric", "declared", "label", "front"),
    [
        ("bleu", {}, "BLEU (more is better)", [(1, 25.0), (8, 30.0)]),
        ("wer", {"wer": {"label": "WER", "better": "lower"}}, "WER (less is better)", [(1, 25.0), (8, 20.0)]),
        ("wer", {}, "wer", None),
    ],
)
def test_the_front_follows_the_declared_direction(metric: str, declared: Any, label: str, front: Any) -> None:
    sizes = {"base": (8, 20.0), "other": (8, 30.0), "small": (1, 25.0)}
    records = [
        {"name": n, "bytes": b * 2**20, "quality": {metric: p}, "figures": declared} for n, (b, p) in sizes.items()
    ]
    axes = compress.plots.pareto(records, metric=metric).axes[0]
    lines = [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()]
    assert axes.get_ylabel() == label
    assert len(lines) == (4 if front else 3)
    assert front is None or lines[0] == front


def test_each_kind_of_axis_has_a_panel_with_ordered_values() -> None:
    values = {
        "hidden": torch.tensor([0.1, 0.9]),
        "layer.0.ffn": torch.tensor([0.2, 0.4, 0.3]),
        "layer.1.ffn": torch.ones(3, requires_grad=True),
    }
    figure = compress.plots.masks(values)
    assert [axes.get_title("left") for axes in figure.axes] == ["hidden", "ffn"]
    found = lines_of(figure.axes[1])
    assert found["layer.0.ffn"] == pytest.approx([0.4, 0.3, 0.2])
    assert found["layer.1.ffn"] == [1.0, 1.0, 1.0]
    stacks = compress.plots.masks({"encoder.layer.0.heads": torch.ones(2), "decoder.layer.0.heads": torch.ones(2)})
    assert len(stacks.axes) == 2


def test_figures_can_be_saved_and_leave_the_settings_of_matplotlib() -> None:
    before = dict(matplotlib.rcParams)
    figure = compress.plots.masks(compress.Masks({"hidden": torch.ones(3)}, scored=False))
    out = io.BytesIO()
    figure.savefig(out, format="png")
    assert out.getvalue().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match="trained: int has no training history"):
        compress.plots.training(3)
    with pytest.raises(NothingDoneError, match="trained: has 1 steps"):
        compress.plots.training(history(1))
    with pytest.raises(UserError, match="metric: no record has 'bleu'"):
        compress.plots.pareto([{"name": "a", "bytes": 1, "quality": {"perplexity": 2.0}}], metric="bleu")
    with pytest.raises(NothingDoneError, match="records: 1 have perplexity"):
        compress.plots.pareto([{"name": "a", "bytes": 1, "quality": {"perplexity": 2.0}}])
    with pytest.raises(UserError, match="masks: list contains no mask values"):
        compress.plots.masks([1.0])
    with pytest.raises(NothingDoneError, match="masks: contains no axis"):
        compress.plots.masks({})


@pytest.mark.parametrize("function", [compress.plots.training, compress.plots.pareto, compress.plots.masks])
def test_the_example_runs(function: Any) -> None:
    names = {"compress": compress, "torch": torch}
    (example,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs=names)
    assert example.examples
    report: list[str] = []
    doctest.DocTestRunner().run(example, out=report.append)
    assert not report, "".join(report)
