"""Hidden-state distillation (SIMPLE, Tao et al. 2023, third part of equation 7)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.problem import Problem
from compress.terms.counterparts import counterparts, layer_problems
from compress.training.forward import View
from compress.training.objective import Outline, StateTerm


class HiddenMSE(StateTerm):
    """Mean squared error on the hidden dimensions (units) the student kept, averaged over layers and real tokens.

    The paper names the loss but not its form. Here, teacher states are restricted to the units the student kept. Each
    student layer is compared with the teacher layer it came from, also if the teacher has more layers. The teacher's
    state that matches the input of the student's final normalization goes through the teacher's final normalization.
    ``layers: last`` compares only the final states.
    """

    type: Literal["hidden_mse"] = "hidden_mse"
    layers: Literal["all", "last"] = "all"

    hidden: ClassVar[bool] = True
    needs_ancestor: ClassVar[bool] = True

    def problems(self, student: Outline, teacher: Outline | None) -> Iterator[Problem]:
        if self.layers == "all":
            yield from layer_problems(student, teacher, self.type)

    def loss(self, student: View, teacher: View | None, module: nn.Module | None) -> Tensor:
        assert teacher is not None
        if self.layers == "last":
            pairs = [(student.hidden[-1], teacher.hidden[-1])]
        else:
            pairs = list(zip(student.hidden, _states_below(student, teacher, self.type), strict=True))
        kept = student.side.kept.get("hidden")
        index = torch.as_tensor(kept, device=student.hidden[0].device) if kept is not None else None
        mask = student.mask_BT
        losses = [_mse(s[mask], (t if index is None else t.index_select(-1, index))[mask]) for s, t in pairs]
        return torch.stack(losses).mean()


def _states_below(student: View, teacher: View, term: str) -> list[Tensor]:
    """Return the teacher's states that match the student's: the embedded tokens, then the output of each layer."""
    layers = counterparts(student.side, teacher.side, term)
    states = [teacher.hidden[0], *(teacher.hidden[layer + 1] for layer in layers)]
    norm = teacher.side.family.closing_norm(teacher.side.config)
    if norm is not None and layers[-1] + 2 != len(teacher.hidden):  # transformers normalizes only the last one
        with torch.no_grad():
            states[-1] = teacher.side.model.get_submodule(norm)(states[-1])
    return states


def _mse(ours: Tensor, theirs: Tensor) -> Tensor:
    return F.mse_loss(ours.float(), theirs.float()) if len(ours) else ours.float().sum()  # a process may have no tokens
