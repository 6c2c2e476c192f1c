"""A model that generates and scores text: one interface for torch and ONNX artifacts.

Shapes: B rows, T positions (of the decoder, for sequence-to-sequence models), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig

from compress.artifact import Artifact
from compress.data import Batch, ModelInterface
from compress.generation.settings import (
    Generation,
    ends_of,
    forced_tokens,
    generation_settings,
    padded,
    through_end,
    until_end,
)
from compress.models.structure import IGNORE
from compress.onnx.runtime import Runtime
from compress.training.forward import Side, nll, run_body


class Subject(Protocol):
    """The methods that quality measurements and training need from a model."""

    runtime: str

    def nll(self, batch: Batch) -> tuple[float, int]:
        """Return summed negative log-likelihood of the scored positions in nats, and the number of positions."""
        ...

    def logits(self, batch: Batch) -> Tensor:
        """Return logits in float32 on the CPU, [B, T, V]."""
        ...

    def generate(self, prompts: Sequence[list[int]], decoding: Generation, seed: int) -> list[list[int]]:
        """Continue prompts, or respond to sources. Return the new tokens of each row before its end token."""
        ...


def subject_of(artifact: Artifact, device: str) -> Subject:
    """Open an artifact for measuring, in float32."""
    return OnnxSubject(artifact) if "onnx" in artifact.traits else TorchSubject.of(artifact, device)


class TorchSubject:
    """A torch model and its end tokens."""

    runtime = "torch"

    def __init__(self, side: Side, tokenizer: Any, ends: Sequence[int]) -> None:
        self.side, self.tokenizer, self.ends = side, tokenizer, ends

    @classmethod
    def of(cls, artifact: Artifact, device: str) -> Self:
        """Open an artifact as ``compress.load`` does."""
        return cls.with_model(artifact, artifact.model(device=device))

    @classmethod
    def with_model(cls, artifact: Artifact, model: nn.Module) -> Self:
        """Return a model with the tokenizer and the end tokens of the artifact it was made from."""
        tokenizer = artifact.tokenizer()
        return cls(Side(model, artifact.family()), tokenizer, ends_of(artifact, tokenizer))

    def nll(self, batch: Batch) -> tuple[float, int]:
        return nll(self.side, self._moved(batch))

    def logits(self, batch: Batch) -> Tensor:
        with torch.inference_mode():
            states_BTD = run_body(self.side, self._moved(batch)).last_hidden_state
            return self.side.family.logits(self.side.model, states_BTD).float().cpu()

    def generate(self, prompts: Sequence[list[int]], decoding: Generation, seed: int) -> list[list[int]]:
        settings = generation_settings(self.side.config, self.tokenizer, self.ends, decoding)
        return [until_end(row, self.ends) for row in self._new_tokens(prompts, settings, seed)]

    def complete(self, prompts: Sequence[list[int]], decoding: Generation, seed: int) -> list[list[int]]:
        """Return responses to train on. A row includes its end token if the model wrote one; none is forced."""
        settings = generation_settings(self.side.config, self.tokenizer, self.ends, decoding)
        settings.forced_eos_token_id = None  # otherwise a student would learn to stop where a response was cut
        return [through_end(row, self.ends) for row in self._new_tokens(prompts, settings, seed)]

    def _new_tokens(self, prompts: Sequence[list[int]], settings: GenerationConfig, seed: int) -> list[list[int]]:
        """Return the new tokens of each row, with padding after its end, and restore the model's settings."""
        model: Any = self.side.model
        seq2seq = self.side.family.task == "seq2seq"
        ids, mask = padded(prompts, settings.pad_token_id, left=not seq2seq)
        own, model.generation_config = model.generation_config, settings
        devices = [self.side.device] if self.side.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.inference_mode():
                torch.manual_seed(seed)
                found = model.generate(input_ids=ids.to(self.side.device), attention_mask=mask.to(self.side.device))
        finally:
            model.generation_config = own
        start = 1 if seq2seq else ids.shape[1]
        new: list[list[int]] = found[:, start:].tolist()
        return new

    def _moved(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.side.device) for name, tensor in batch.items()}


class OnnxSubject:
    """An exported artifact in onnxruntime."""

    runtime = "onnxruntime"

    def __init__(self, artifact: Artifact) -> None:
        self.model = Runtime.open(artifact.path)
        tokenizer = artifact.tokenizer()
        self.pad = ModelInterface.of(artifact.config(), tokenizer).pad
        self.ends = ends_of(artifact, tokenizer)
        self.forced = forced_tokens(artifact.config())

    def nll(self, batch: Batch) -> tuple[float, int]:
        scored = batch["labels"] != IGNORE
        logits_NV = self.logits(batch)[scored]
        return float(F.cross_entropy(logits_NV, batch["labels"][scored], reduction="sum").double()), int(scored.sum())

    def logits(self, batch: Batch) -> Tensor:
        ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
        if self.model.reads_sources:
            found = self.model.answer(ids, mask).feed(batch["decoder_input_ids"].numpy())
        else:
            found = self.model.logits(ids, mask)
        return torch.from_numpy(np.asarray(found, dtype=np.float32))

    def generate(self, prompts: Sequence[list[int]], decoding: Generation, seed: int) -> list[list[int]]:
        ids, mask = (each.numpy() for each in padded(prompts, self.pad, left=not self.model.reads_sources))
        found = self.model.generate(ids, mask, seed=seed, eos_token_id=self.ends, **self.forced, **decoding.options())
        return [until_end(row, self.ends) for row in found[:, self.model.given(ids).shape[1] :].tolist()]
