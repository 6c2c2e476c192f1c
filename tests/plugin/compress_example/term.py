"""A loss term: the squared error of logits (Ba and Caruana, 2014, arXiv 1312.6184)."""

from typing import Literal

from torch import Tensor

from compress.training.objective import LogitTerm


class LogitMSE(LogitTerm):
    """Mean squared error of the logits, each side centred at 0: softmax does not see a constant."""

    type: Literal["logit_mse"] = "logit_mse"

    def per_token(self, student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor) -> Tensor:
        """The loss of each token: logits [N, V] -> [N]."""
        assert teacher_NV is not None  # needs_teacher is true by default, so a recipe without one is refused
        student, teacher = (logits - logits.mean(-1, keepdim=True) for logits in (student_NV, teacher_NV))
        return (student - teacher).square().mean(-1)
