"""Distillation steps on the student's own responses (GKD, Agarwal et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import nn

from compress.artifact import Artifact
from compress.data import Batch, ModelInterface, Split
from compress.data.targets import prompts_in, response_batch
from compress.distributed import processes
from compress.generation.seeds import seed_of
from compress.generation.settings import Generation
from compress.generation.subject import TorchSubject
from compress.onnx.runtime.sampling import LEAST_TEMPERATURE
from compress.problem import Problem
from compress.schema import Strict
from compress.training.objective import LossTerm, StateTerm


class OnPolicy(Strict):
    """Some steps train on responses that the current student samples for the batch's prompts.

    Sampling runs without gradient and without dropout. Nothing is scored after the end of a response.
    """

    fraction: float = Field(0.5, ge=0, le=1)
    """Probability that a step trains on sampled responses."""
    temperature: float = Field(1.0, ge=LEAST_TEMPERATURE)
    """Logits are divided by this before a token is sampled."""
    top_k: int = Field(0, ge=0)
    """Tokens to sample from; 0 for all."""
    max_new_tokens: int = Field(64, ge=1)
    """Maximum tokens of a response. A response without an end token is scored up to its last token."""

    @field_validator("fraction")
    @classmethod
    def _some(cls, fraction: float) -> float:
        if fraction == 0:
            raise ValueError("no step would use the student's own responses; leave on_policy out")
        return fraction

    def problems(self, terms: Sequence[LossTerm]) -> Iterator[Problem]:
        """Yield the problems of terms that cannot use sampled responses. Paths start at ``terms`` of the stage."""
        for i, term in enumerate(terms):
            if term.needs_labels:
                text = f"{term.type} scores the tokens of the data, but on_policy replaces them"
                yield Problem(("terms", i), text)
            elif isinstance(term, StateTerm) and term.numbered:
                text = f"{term.type} stores values for each row of the data, but on_policy replaces rows"
                yield Problem(("terms", i), text)

    def responses(self, source: Artifact, model: nn.Module, data: Split, seed: int, precision: str) -> StudentResponses:
        """Return the sampler of responses of ``model``, which was made from ``source`` and trains on ``data``."""
        autocast = torch.bfloat16 if precision == "bf16" else None
        return StudentResponses(self, TorchSubject.with_model(source, model), data.model, seed, autocast)


@dataclass(frozen=True)
class StudentResponses:
    """Replaces the targets of the data by the student's responses. Seed, step and student determine them."""

    config: OnPolicy
    student: TorchSubject
    interface: ModelInterface
    seed: int
    autocast: torch.dtype | None

    def chosen(self, step: int) -> bool:
        """Return whether step ``step`` (from 0) uses the student's responses. Every process gets the same answer."""
        return bool(np.random.default_rng([self.seed, step]).random() < self.config.fraction)

    def batch(self, batch: Batch, step: int, part: int) -> Batch:
        """Return this process's rows of part ``part`` of a step, with responses sampled in evaluation mode."""
        model, config = self.student.side.model, self.config
        prompts = prompts_in(batch, self.interface.task)
        decoding = Generation(
            max_new_tokens=config.max_new_tokens, do_sample=True, temperature=config.temperature, top_k=config.top_k
        )
        training = model.training
        model.eval()
        try:
            device = self.student.side.device.type
            with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
                seed = seed_of(self.seed, step, part, processes.rank())
                found = self.student.complete(prompts, decoding, seed)
        finally:
            model.train(training)
        return response_batch(prompts, found, self.interface)
