"""Key/value distillation of causal attentions (SIMPLE, Tao et al. 2023, equation 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.models.family import ModelFamily
from compress.models.structure import Attention, Projection
from compress.problem import Problem
from compress.terms.counterparts import counterparts, layer_problems
from compress.training.forward import View
from compress.training.objective import Outline, StateTerm


class CausalKV(StateTerm):
    """MSE(K_t, K_s) + MSE(V_t, V_s) over the heads the student kept, averaged over heads, layers and real tokens.

    If query heads share keys and values, the heads are the key/value heads.

    Each student layer is compared with the teacher layer it came from, also if the teacher has more layers.
    Under a causal mask, later tokens read past tokens only through their keys and values. Only causal attentions
    count: every layer of a decoder-only model, and the decoder's self-attention of an encoder-decoder.
    """

    type: Literal["causal_kv"] = "causal_kv"

    needs_ancestor: ClassVar[bool] = True

    def attentions(self, family: ModelFamily, config: Any) -> Sequence[Attention]:
        return [attention for attention in family.attentions(config) if attention.causal]

    def problems(self, student: Outline, teacher: Outline | None) -> Iterator[Problem]:
        yield from layer_problems(student, teacher, self.type)

    def loss(self, student: View, teacher: View | None, module: nn.Module | None) -> Tensor:
        assert teacher is not None
        ours = self.attentions(student.side.family, student.side.config)
        theirs = self.attentions(teacher.side.family, teacher.side.config)
        others = [theirs[layer] for layer in counterparts(student.side, teacher.side, self.type)]
        heads = {axis.name: axis.size for axis in teacher.side.family.axes(teacher.side.config)}
        losses = [
            _mse(student, teacher, pair, attention.kv_axis, heads[other.kv_axis])
            for attention, other in zip(ours, others, strict=True)
            for pair in ((attention.key, other.key), (attention.value, other.value))
        ]
        return 2 * torch.stack(losses).mean()


def _mse(student: View, teacher: View, pair: tuple[Projection, Projection], axis: str, heads: int) -> Tensor:
    mask = student.mask_BT
    ours, theirs = student.projected(pair[0])[mask].float(), teacher.projected(pair[1])[mask].float()
    kept = student.side.kept.get(axis)
    if kept is not None:
        theirs = theirs.view(len(theirs), heads, -1)[:, torch.as_tensor(kept, device=theirs.device)].flatten(1)
    return F.mse_loss(ours, theirs) if len(ours) else ours.sum()  # a process may receive no tokens of a batch
