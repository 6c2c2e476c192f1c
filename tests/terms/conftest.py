"""Batches with padding and aligned labels, and sides, for terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.models import family_of
from compress.training.forward import Side


@pytest.fixture
def side() -> Callable[..., Side]:
    """A model as the objective sees it."""
    return lambda model, kept=None, layers=None: Side(model, family_of(model.config), kept or {}, layers or {})


@pytest.fixture
def batch(tiny_inputs: Any) -> Callable[[Any], dict[str, torch.Tensor]]:
    """A batch for a model: three rows, the first one padded."""

    def make(model: Any) -> dict[str, torch.Tensor]:
        inputs: dict[str, torch.Tensor] = tiny_inputs(model, batch=3, length=9)
        name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        mask = inputs["attention_mask"]
        if model.config.is_encoder_decoder:
            mask = inputs["decoder_attention_mask"] = torch.ones_like(inputs[name])
            mask[1, -1] = 0
        labels = inputs[name].roll(-1, 1).masked_fill(mask == 0, -100)
        labels[:, -1] = -100
        return {**inputs, "labels": labels}

    return make
