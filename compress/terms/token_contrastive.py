"""Token-level contrastive distillation (QuantGPT, Tao et al. 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.distributed import collectives
from compress.functional.contrastive import smoothed, token_contrastive, update_bank, vocabulary_contrastive
from compress.problem import Problem
from compress.schema import added
from compress.training.forward import Side, View
from compress.training.objective import StateTerm

GB = 2**30
MOST = 4
"""The maximum size in GB of a bank with one row per position. Every checkpoint holds the whole bank."""


class TokenContrastive(StateTerm):
    """Pull each token's last state towards the teacher's same token and away from other tokens.

    Both sides are projected linearly to ``size`` dimensions. The student's projected token is smoothed with its row of
    a memory bank: q = momentum * bank[row] + (1 - momentum) * h. ``bank`` has one row per ``vocabulary`` id, or one per
    ``position`` of the training data. The other tokens are the ``teacher``'s (or ``student``'s) states of the same
    sequence, or ``num_negatives`` random rows of the bank (``vocabulary``). The mean is over real tokens. Projections
    and bank are discarded after the stage.
    """

    type: Literal["token_contrastive"] = "token_contrastive"
    temperature: float = Field(0.1, gt=0)
    """The cosine similarities are divided by this number."""
    momentum: float = Field(0.5, ge=0, lt=1)
    """Weight of the bank's row in a smoothed token. 0 means no bank."""
    size: int = Field(128, ge=1)
    """Number of dimensions that both sides are projected to."""
    bank: Literal["vocabulary", "position"] = added("vocabulary")
    """Meaning of a row of the bank. ``position`` needs a momentum above 0, and 4 bytes x rows x longest row x size."""
    negatives: Literal["teacher", "student", "vocabulary"] = added("teacher")
    """Source of the other tokens. ``vocabulary`` needs num_negatives, a momentum above 0 and bank: vocabulary."""
    num_negatives: int | None = Field(None, ge=1)
    """Number of other tokens drawn for each token. The default is all tokens of the sequence."""
    positive_in_denominator: bool = True
    """Whether the teacher's same token is also included in the denominator."""
    exclude_duplicates: bool = False
    """Leave out tokens with the same id. Refused with negatives: vocabulary, where it has no effect."""

    @model_validator(mode="after")
    def _options_agree(self) -> TokenContrastive:
        if self.bank == "position" and self.momentum == 0:
            raise ValueError("bank: position does nothing without a momentum above 0")
        if self.negatives != "vocabulary":
            return self
        if self.num_negatives is None or self.momentum == 0 or self.bank != "vocabulary":
            raise ValueError(
                "negatives: vocabulary draws num_negatives rows of the memory bank; "
                "it needs num_negatives, a momentum above 0 and bank: vocabulary"
            )
        if self.exclude_duplicates:
            raise ValueError(
                "exclude_duplicates does nothing with negatives: vocabulary, which already leave out the same id"
            )
        return self

    @property
    def numbered(self) -> bool:
        """Whether rows of the training data must be numbered, which a bank of positions needs."""
        return self.bank == "position"

    def module(self, student: Side, teacher: Side) -> nn.Module:
        """Two projections and the bank. The teacher's projection starts as a copy of the student's if widths agree."""
        return Projections(student.hidden_size, teacher.hidden_size, self.size, student.config.vocab_size)

    def room_problems(self, rows: int, longest: int) -> Iterator[Problem]:
        """Check the memory for a bank of positions, which needs 4 bytes x ``rows`` x ``longest`` x ``size``."""
        most = MOST * GB // (4 * rows * longest)
        if self.size > most:
            yield Problem(
                ("size",),
                f"{self.size}; bank: position allows at most {most} for {rows} rows of up to {longest} tokens "
                f"in {MOST} GB (or use bank: vocabulary)",
            )

    def make_room(self, module: nn.Module | None, rows: int, longest: int) -> None:
        """Create the bank of positions, [rows, longest, size]."""
        assert isinstance(module, Projections)
        module.bank = module.bank.new_zeros(rows, longest, self.size)

    def loss(self, student: View, teacher: View | None, module: nn.Module | None) -> Tensor:
        assert teacher is not None and isinstance(module, Projections)
        mask = student.mask_BT
        projected = module.student(student.final_BTD.float())
        target = module.teacher(teacher.final_BTD.float())
        at = self._rows(student)
        kept = module.bank[at] if self.momentum > 0 else None
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "momentum": self.momentum,
            "num_negatives": self.num_negatives,
            "positive_in_denominator": self.positive_in_denominator,
        }
        if self.negatives == "vocabulary":
            losses_BT = vocabulary_contrastive(
                projected, target, mask, bank=module.bank, tokens=student.tokens_BT, **options
            )
        else:
            same = student.tokens_BT if self.exclude_duplicates else None
            losses_BT = token_contrastive(
                projected, target, mask, bank=kept, negatives=self.negatives, exclude_duplicates_of=same, **options
            )
        if kept is not None and module.training:
            values = smoothed(projected.detach(), kept, momentum=self.momentum)
            self._remember(module.bank, tuple(index[mask] for index in at), values[mask])
        return losses_BT.sum() / mask.sum().clamp(min=1)

    def _rows(self, student: View) -> tuple[Tensor, ...]:
        """Return the index tensors, each [B, T], that select the bank's row for each token."""
        tokens = student.tokens_BT
        if self.bank == "vocabulary":
            return (tokens,)
        rows, positions = student.batch["rows"], torch.arange(tokens.shape[1], device=tokens.device)
        return rows.unsqueeze(1).expand_as(tokens), positions.expand_as(tokens)

    def _remember(self, bank: Tensor, at: tuple[Tensor, ...], values: Tensor) -> None:
        """Store the values of all processes. A position comes once per batch, a vocabulary id maybe more often."""
        at, values = tuple(collectives.gathered(index) for index in at), collectives.gathered(values)
        if self.bank == "position":
            bank[at] = values
        else:
            bank.copy_(update_bank(bank, at[0], values, torch.ones_like(at[0])))


class Projections(nn.Module):
    """The trainable part of the term. ``bank`` starts at zero and is saved in checkpoints."""

    bank: Tensor

    def __init__(self, student: int, teacher: int, size: int, vocabulary: int) -> None:
        super().__init__()
        self.student = nn.Linear(student, size, bias=False)
        self.teacher = nn.Linear(teacher, size, bias=False)
        if student == teacher:
            self.teacher.load_state_dict(self.student.state_dict())
        self.register_buffer("bank", torch.zeros(vocabulary, size))
