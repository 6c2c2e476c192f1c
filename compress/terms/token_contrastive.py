"""Token-level contrastive distillation (QuantGPT, Tao et al. 2022, section 3.1)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress import collective
from compress.functional.contrastive import smoothed, token_contrastive, update_bank, vocabulary_contrastive
from compress.objective import Side, StateTerm, View
from compress.schema import added


class TokenContrastive(StateTerm):
    """Pull each token's last state towards the teacher's same token and away from other tokens.

    Both sides are projected linearly to ``size`` dimensions; the student's projected token is smoothed with the row of
    a memory bank that its vocabulary id selects: q = momentum * bank[id] + (1 - momentum) * h. Other tokens are those
    of the sequence as the ``teacher`` (or ``student``) shows them, or ``num_negatives`` random rows of the bank
    (``vocabulary``). The mean is over real tokens. Projections and bank live for the stage only.
    """

    type: Literal["token_contrastive"] = "token_contrastive"
    temperature: float = Field(0.1, gt=0)
    momentum: float = Field(0.5, ge=0, lt=1)
    size: int = Field(128, ge=1)
    negatives: Literal["teacher", "student", "vocabulary"] = added("teacher")
    num_negatives: int | None = Field(None, ge=1)
    positive_in_denominator: bool = True
    exclude_duplicates: bool = False

    @model_validator(mode="after")
    def _vocabulary_has_a_bank(self) -> TokenContrastive:
        if self.negatives == "vocabulary" and (self.num_negatives is None or self.momentum == 0):
            raise ValueError(
                "negatives: vocabulary draws num_negatives rows of the memory bank; "
                "it needs num_negatives and a momentum above 0"
            )
        if self.negatives == "vocabulary" and self.exclude_duplicates:
            raise ValueError("exclude_duplicates does nothing with negatives: vocabulary, which leave the own id out")
        return self

    def module(self, student: Side, teacher: Side) -> nn.Module:
        """Two projections, the teacher's initialised equal to the student's where their widths allow, and the bank."""
        return Projections(student.hidden_size, teacher.hidden_size, self.size, student.config.vocab_size)

    def loss(self, student: View, teacher: View | None, module: nn.Module | None) -> Tensor:
        assert teacher is not None and isinstance(module, Projections)
        tokens, mask = student.tokens_BT, student.mask_BT
        projected = module.student(student.final_BTD.float())
        target = module.teacher(teacher.final_BTD.float())
        losses_BT = self._losses(projected, target, mask, tokens, module.bank)
        if self.momentum > 0 and module.training:
            rows = smoothed(projected.detach(), module.bank[tokens], momentum=self.momentum)
            seen, values = collective.gathered(tokens[mask]), collective.gathered(rows[mask])
            module.bank.copy_(update_bank(module.bank, seen, values, torch.ones_like(seen)))
        return losses_BT.sum() / mask.sum().clamp(min=1)

    def _losses(self, student: Tensor, teacher: Tensor, mask: Tensor, tokens: Tensor, bank: Tensor) -> Tensor:
        """The loss of each token, [B, T], from projected states [B, T, size]."""
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "momentum": self.momentum,
            "positive_in_denominator": self.positive_in_denominator,
        }
        if self.negatives == "vocabulary":
            assert self.num_negatives is not None
            return vocabulary_contrastive(
                student, teacher, mask, bank=bank, tokens=tokens, num_negatives=self.num_negatives, **options
            )
        return token_contrastive(
            student,
            teacher,
            mask,
            bank=bank[tokens] if self.momentum > 0 else None,
            negatives=self.negatives,
            num_negatives=self.num_negatives,
            exclude_duplicates_of=tokens if self.exclude_duplicates else None,
            **options,
        )


class Projections(nn.Module):
    """The trainable part of the term; ``bank`` [vocabulary, size] starts at zero and travels with checkpoints."""

    bank: Tensor

    def __init__(self, student: int, teacher: int, size: int, vocabulary: int) -> None:
        super().__init__()
        self.student = nn.Linear(student, size, bias=False)
        self.teacher = nn.Linear(teacher, size, bias=False)
        if student == teacher:
            self.teacher.load_state_dict(self.student.state_dict())
        self.register_buffer("bank", torch.zeros(vocabulary, size))
