"""A torch model that decodes token by token, as ``generate`` of transformers does."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch

from compress.artifact import Artifact
from compress.data import ModelInterface


class TorchStepper:
    """A torch model in eager mode, float32, on one device."""

    runtime = "torch eager"

    def __init__(self, model: Any, device: str | torch.device) -> None:
        self.model = model
        self._start = ModelInterface.of(model.config).decoder_start
        self._device = torch.device(device)
        self._fixed: dict[str, Any] = {}
        self._cache: Any = None
        self._tokens: torch.Tensor

    @classmethod
    def of(cls, artifact: Artifact, device: str) -> Self:
        """Open an artifact as ``compress.load`` does."""
        return cls(artifact.model(device=device), device)

    @torch.inference_mode()
    def prefill(self, ids: Any, new_tokens: int) -> None:
        tokens = torch.from_numpy(np.asarray(ids)).to(self._device)
        self._cache = None
        if self._start is not None:
            self._fixed = {"encoder_outputs": self.model.get_encoder()(input_ids=tokens)}
            tokens = torch.full_like(tokens[:, :1], self._start)
        self._feed(tokens)

    @torch.inference_mode()
    def step(self) -> None:
        self._feed(self._tokens)

    def _feed(self, tokens: torch.Tensor) -> None:
        name = "input_ids" if self._start is None else "decoder_input_ids"
        output = self.model(**{name: tokens}, **self._fixed, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        self._tokens = output.logits[:, -1].argmax(-1, keepdim=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
