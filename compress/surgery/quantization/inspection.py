"""Diagnostics of a quantized model: weight distributions with clip values, and similarity of embedding rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.functional.fake_quant import levels
from compress.surgery.quantization.modules import fake_quantized

BINS = 64


@torch.no_grad()
def histograms(model: nn.Module) -> list[dict[str, Any]]:
    """For each fake-quantized weight: module, 65 bin edges, 64 counts, and the clip value (the mean, if several)."""
    found = []
    for weight in fake_quantized(model):
        values = weight.weight.detach().float().cpu()
        limit = max(float(values.abs().max()), 1e-12)
        counts = torch.histc(values, BINS, -limit, limit)
        _, scale = weight.codes()
        found.append(
            {
                "module": weight.spec.module,
                "edges": torch.linspace(-limit, limit, BINS + 1).tolist(),
                "counts": [int(count) for count in counts],
                "clip": float(scale.mean()) * levels(weight.spec.bits),
            }
        )
    return found


@torch.no_grad()
def mean_cosine(rows_ND: Tensor) -> float:
    """Return the mean cosine similarity between different rows of [N, D], without rows of zeros. 0 for fewer than two.

    Near 1, the rows are almost parallel and tokens are hard to distinguish (QuantGPT, arXiv 2203.10705, figure 3).
    """
    rows_ND = rows_ND.double()
    unit_ND = F.normalize(rows_ND[rows_ND.abs().amax(1) > 0], dim=1)
    count = len(unit_ND)
    if count < 2:
        return 0.0
    return float((unit_ND.sum(0).square().sum() - count) / (count * (count - 1)))
