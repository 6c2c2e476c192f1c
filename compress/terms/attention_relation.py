"""Self-attention relation distillation (MiniLMv2, Wang et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import ModelError
from compress.functional.relation import attention_relation
from compress.models import family_of
from compress.models.family import ModelFamily
from compress.models.structure import Attention
from compress.problem import Problem
from compress.training.forward import View
from compress.training.objective import Outline, StateTerm


class AttentionRelation(StateTerm):
    """KL between teacher's and student's query-query, key-key and value-value relations of one decoder attention.

    Heads are concatenated and split again into ``heads`` relation heads, so head counts and hidden sizes may differ.
    ``layer`` is the number of a teacher layer. The student's last layer learns from it.
    """

    type: Literal["attention_relation"] = "attention_relation"
    heads: int = Field(ge=1)
    layer: int = -1

    def attentions(self, family: ModelFamily, config: Any) -> Sequence[Attention]:
        return [attention for attention in family.attentions(config) if attention.causal]

    def problems(self, student: Outline, teacher: Outline | None) -> Iterator[Problem]:
        assert teacher is not None
        layers = self.attentions(family_of(teacher.config), teacher.config)
        if not -len(layers) <= self.layer < len(layers):
            yield self._no_layer(len(layers))
            return
        ours, theirs = self.attentions(family_of(student.config), student.config)[-1], layers[self.layer]
        widths = list(dict.fromkeys([*_widths(student, ours), *_widths(teacher, theirs)]))
        if any(width % self.heads for width in widths):
            common = math.gcd(*widths)
            allowed = ", ".join(str(count) for count in range(1, common + 1) if common % count == 0)
            named = " and ".join(map(str, widths if len(widths) > 1 else widths * 2))
            text = f"{self.heads} does not divide {named}, the widths of all heads of student and teacher"
            yield Problem(("heads",), f"{text}; allowed: {allowed}")

    def _no_layer(self, layers: int) -> Problem:
        return Problem(("layer",), f"the teacher has no layer {self.layer}; allowed: {-layers} to {layers - 1}")

    def loss(self, student: View, teacher: View | None, module: nn.Module | None) -> Tensor:
        assert teacher is not None
        ours = self.attentions(student.side.family, student.side.config)[-1]
        layers = self.attentions(teacher.side.family, teacher.side.config)
        if not -len(layers) <= self.layer < len(layers):
            raise ModelError(self._no_layer(len(layers)).inside(self.type))
        theirs = layers[self.layer]
        mask = student.mask_BT
        pairs = ((ours.query, theirs.query), (ours.key, theirs.key), (ours.value, theirs.value))
        for view, attention in ((student, ours), (teacher, theirs)):
            for projection in (attention.query, attention.key):
                if (width := view.projected(projection).shape[-1]) % self.heads:
                    text = f"{self.heads} does not divide {width}, the width of all heads"
                    raise ModelError(Problem((self.type, "heads"), text))
        losses = [
            attention_relation(
                student.projected(s).float(), teacher.projected(t).float(), heads=self.heads, causal=True, mask=mask
            )
            for s, t in pairs
        ]
        tokens = mask.sum().clamp(min=1) * self.heads
        return torch.stack(losses).sum() / tokens


def _widths(model: Outline, attention: Attention) -> list[int]:
    """Return channels of the queries of all heads, and of all keys."""
    axes = {axis.name: axis for axis in family_of(model.config).axes(model.config)}
    found = []
    for name, projection in ((attention.axis, attention.query), (attention.kv_axis, attention.key)):
        slot = next(slot for slot in axes[name].slots if slot.module == projection.module)
        found.append(model.sizes[name] * slot.width)
    return found
