"""Terms over vocabulary distributions, token by token. P is the teacher's distribution, Q the student's."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from compress.functional import divergence
from compress.training.objective import LogitTerm


class CrossEntropy(LogitTerm):
    """Negative log-likelihood of the tokens of the data, -log Q(y)."""

    type: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def per_token(self, student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor) -> Tensor:
        return F.cross_entropy(student_NV, labels_N, reduction="none", label_smoothing=self.label_smoothing)


class ForwardKL(LogitTerm):
    """KL(P||Q): the soft cross-entropy of logit distillation minus the teacher's entropy."""

    type: Literal["forward_kl"] = "forward_kl"

    def per_token(self, student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor) -> Tensor:
        return divergence.forward_kl(student_NV, _required(teacher_NV))


class ReverseKL(LogitTerm):
    """KL(Q||P)."""

    type: Literal["reverse_kl"] = "reverse_kl"

    def per_token(self, student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor) -> Tensor:
        return divergence.reverse_kl(student_NV, _required(teacher_NV))


class AdaptiveKL(LogitTerm):
    """Forward and reverse KL weighted by their gaps on the teacher's head and tail (AKL, Wu et al. 2024)."""

    type: Literal["adaptive_kl"] = "adaptive_kl"
    head_mass: float = Field(0.5, gt=0, lt=1)
    head_rule: Literal["exclusive", "inclusive"] = "exclusive"

    def per_token(self, student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor) -> Tensor:
        return divergence.adaptive_kl(
            student_NV, _required(teacher_NV), head_mass=self.head_mass, head_rule=self.head_rule
        )


class JensenShannon(LogitTerm):
    """Generalised Jensen-Shannon divergence of GKD; beta 0 is KL(P||Q), beta 1 is KL(Q||P)."""

    type: Literal["jensen_shannon"] = "jensen_shannon"
    beta: float = Field(0.5, ge=0, le=1)

    def per_token(self, student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor) -> Tensor:
        return divergence.jensen_shannon(student_NV, _required(teacher_NV), beta=self.beta)


class SkewForwardKL(LogitTerm):
    """KL(P || alpha P + (1 - alpha) Q) of DistiLLM."""

    type: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: float = Field(0.1, ge=0, lt=1)

    def per_token(self, student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor) -> Tensor:
        return divergence.skew_forward_kl(student_NV, _required(teacher_NV), alpha=self.alpha)


class SkewReverseKL(LogitTerm):
    """KL(Q || (1 - alpha) P + alpha Q) of DistiLLM."""

    type: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: float = Field(0.1, ge=0, lt=1)

    def per_token(self, student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor) -> Tensor:
        return divergence.skew_reverse_kl(student_NV, _required(teacher_NV), alpha=self.alpha)


class TotalVariation(LogitTerm):
    """Half the L1 distance of P and Q."""

    type: Literal["total_variation"] = "total_variation"

    def per_token(self, student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor) -> Tensor:
        return divergence.total_variation(student_NV, _required(teacher_NV))


def _required(teacher_NV: Tensor | None) -> Tensor:
    assert teacher_NV is not None, "a recipe with this term and no teacher is refused before any work"
    return teacher_NV
