"""Stock RMS normalization in the precision of its input, so that laws can be checked in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm


@pytest.fixture(autouse=True)
def exact_rms_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock class computes in float32 whatever it is given."""

    def forward(self: Any, states: torch.Tensor) -> torch.Tensor:
        variance = states.pow(2).mean(-1, keepdim=True)
        normed: torch.Tensor = self.weight * (states * torch.rsqrt(variance + self.variance_epsilon))
        return normed

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
