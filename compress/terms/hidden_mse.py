"""Hidden-state distillation (SIMPLE, Tao et al. 2023, equation 7's third part)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import ModelError
from compress.objective import StateTerm
from compress.side import View


class HiddenMSE(StateTerm):
    """Mean squared error of hidden states on the kept hidden units, averaged over layers and real tokens.

    The paper names the loss without its form; this is the reading of METHODS: teacher states restricted to the units
    the student kept. ``layers: last`` compares the final states alone.
    """

    type: Literal["hidden_mse"] = "hidden_mse"
    layers: Literal["all", "last"] = "all"

    hidden: ClassVar[bool] = True
    needs_ancestor: ClassVar[bool] = True

    def loss(self, student: View, teacher: View | None, module: nn.Module | None) -> Tensor:
        assert teacher is not None
        ours, theirs = student.hidden, teacher.hidden
        if len(ours) != len(theirs):
            raise ModelError(
                f"hidden_mse needs as many layers in the teacher: {len(theirs) - 1} against {len(ours) - 1}"
            )
        pairs = list(zip(ours, theirs, strict=True))
        if self.layers == "last":
            pairs = pairs[-1:]
        kept = student.side.kept.get("hidden")
        index = torch.as_tensor(kept, device=ours[0].device) if kept is not None else None
        mask = student.mask_BT
        losses = [_mse(s[mask], (t if index is None else t.index_select(-1, index))[mask]) for s, t in pairs]
        return torch.stack(losses).mean()


def _mse(ours: Tensor, theirs: Tensor) -> Tensor:
    return F.mse_loss(ours.float(), theirs.float()) if len(ours) else ours.float().sum()  # no token of a batch
