"""Sparsity of learned masks (SIMPLE, Tao et al. 2023, equation 5)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from compress.surgery.masks import masks_of
from compress.training.forward import View
from compress.training.objective import StateTerm


class MaskL1(StateTerm):
    """Sum of |m| over every mask of the student."""

    type: Literal["mask_l1"] = "mask_l1"

    needs_teacher: ClassVar[bool] = False
    needs_masks: ClassVar[bool] = True

    def loss(self, student: View, teacher: View | None, module: nn.Module | None) -> Tensor:
        masks = masks_of(student.side.model)
        return torch.stack([mask.abs().sum() for mask in masks.values()]).sum()
