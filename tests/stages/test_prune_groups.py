"""Cuts across layers of query heads that share keys and values: the total is shared out, then rounded within groups."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.engine.pruning import Target, cut_to
from compress.models import family_of
from compress.models.structure import AxisKind, sized_axes


def cut_heads(model: Any, scores: dict[str, torch.Tensor], keep: Any) -> tuple[dict[str, int], dict[str, list[int]]]:
    """The sizes after a cut across layers, and the kept units by axis."""
    _, kept = cut_to(model, scores, Target(keep=keep, uniform=False))
    sizes = {axis.name: axis.size for axis in sized_axes(model, family_of(model.config))}
    return sizes, {axis: units.tolist() for axis, units in kept.items()}


def planned(model: Any, kinds: set[AxisKind], keep: Any) -> dict[str, int]:
    axes = sized_axes(model, family_of(model.config))
    masked = {axis.name: axis.kind for axis in axes if axis.kind in kinds}
    return Target(keep=keep, uniform=False).sizes(model.config, {axis.name: axis.size for axis in axes}, masked)


def test_the_total_is_shared_before_it_is_rounded_within_groups(tiny_llama: Any) -> None:
    model = tiny_llama(heads=8, kv_heads=2)
    scores = {
        "layer.0.heads": torch.tensor([9.0, 4, 1, 2, 5, 8, 3, 0]),  # rows of one head per group: 8.5, 4.5, 2.5, 0.5
        "layer.1.heads": torch.tensor([9.0, 8, 1, 2, 0, 0, 0, 1]),  # 5, 4, 1, 0.5
    }
    assert sum(size for axis, size in planned(model, {"heads"}, "3/8").items() if axis.endswith("heads")) == 6
    sizes, kept = cut_heads(model, scores, "3/8")
    assert (sizes["layer.0.heads"], sizes["layer.1.heads"]) == (4, 2)
    assert kept["layer.0.heads"] == [0, 1, 4, 5] and kept["layer.1.heads"] == [0, 7]


@pytest.mark.parametrize(("keep", "total"), [("1/12", 6), ("4/12", 9), ("5/12", 9), ("6/12", 12), ("12/12", 24)])
def test_half_a_row_is_rounded_down_and_each_group_keeps_one_head(keep: str, total: int, tiny_llama: Any) -> None:
    model = tiny_llama(heads=12, kv_heads=3, hidden=48)
    scores = {f"layer.{n}.heads": torch.rand(12, generator=torch.Generator().manual_seed(n)) for n in range(2)}
    sizes, _ = cut_heads(model, scores, keep)
    assert sum(sizes[axis] for axis in scores) == total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_half_of_a_row(dtype: torch.dtype, tiny_llama: Any) -> None:
    model = tiny_llama(heads=8, kv_heads=2, layers=3)
    scores = {f"layer.{n}.heads": (torch.arange(8) + n).to(dtype) for n in range(3)}
    sizes, _ = cut_heads(model, scores, "3/8")  # 9 heads are 4.5 rows of two
    assert [sizes[axis] for axis in scores] == [2, 2, 4]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(8, 2), (6, 3), (4, 1), (12, 3)]),
    layers=st.integers(1, 4),
    heads=st.fractions(Fraction(1, 12), 1, max_denominator=12),
    groups=st.none() | st.fractions(Fraction(1, 4), 1, max_denominator=4),
    seed=st.integers(0, 2**16),
)
def test_a_cut_across_layers_keeps_the_total_within_half_a_row(
    tiny_llama: Any, shape: tuple[int, int], layers: int, heads: Fraction, groups: Fraction | None, seed: int
) -> None:
    count, shared = shape
    held, numbers = count // shared, range(layers)
    model = tiny_llama(heads=count, kv_heads=shared, hidden=48, layers=layers)
    generator = torch.Generator().manual_seed(seed)
    scores = {f"layer.{n}.heads": torch.rand(count, generator=generator) for n in numbers}
    keep: dict[AxisKind, Fraction] = {"heads": heads}
    if groups is not None:
        scores |= {f"layer.{n}.groups": torch.rand(shared, generator=generator) for n in numbers}
        keep["groups"] = groups
    sizes, kept = cut_heads(model, scores, keep)
    left = [sizes[f"layer.{n}.groups"] for n in numbers]
    found = [sizes[f"layer.{n}.heads"] for n in numbers]
    assert sum(left) == layers * (shared if groups is None else max(1, round(shared * groups)))
    assert all(size % group == 0 and group <= size <= held * group for size, group in zip(found, left, strict=True))
    wanted = min(max(layers * max(1, round(count * heads)), sum(left)), held * sum(left))
    assert 2 * abs(sum(found) - wanted) <= max(left)
    if groups is None:
        plan = planned(tiny_llama(heads=count, kv_heads=shared, hidden=48, layers=layers), {"heads"}, keep)
        assert sum(plan[f"layer.{n}.heads"] for n in numbers) == sum(found)
    for n in numbers:  # each kept group holds equally many, and they are its best
        of_groups = scores[f"layer.{n}.heads"].view(shared, held)
        units = torch.tensor(kept[f"layer.{n}.heads"]).view(left[n], -1)
        for group, mine in zip((units[:, 0] // held).tolist(), units % held, strict=True):
            assert set(mine.tolist()) == set(of_groups[group].topk(len(mine)).indices.tolist())


def test_layers_that_share_nothing_keep_the_best_units_of_all(tiny_gpt2: Any) -> None:
    model = tiny_gpt2(layers=3)
    generator = torch.Generator().manual_seed(0)
    scores = {f"layer.{n}.ffn": torch.rand(128, generator=generator) for n in range(3)}
    sizes, kept = cut_heads(model, scores, "1/3")
    assert sum(sizes[axis] for axis in scores) == 3 * 43
    stays = min(scores[axis][units].min() for axis, units in kept.items())
    goes = [scores[axis][[at for at in range(128) if at not in units]].max() for axis, units in kept.items()]
    assert stays > max(goes)
