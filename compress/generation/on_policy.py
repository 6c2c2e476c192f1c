"""Steps of a distillation on the student's own answers (GKD, Agarwal et al., ICLR 2024)."""

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
from compress.generation.settings import Generation, seed_of
from compress.generation.subject import TorchSubject
from compress.onnx.runtime.sampling import LEAST_TEMPERATURE
from compress.schema import Strict
from compress.training.objective import LossTerm, StateTerm


class OnPolicy(Strict):
    """A share of the steps is taken on answers that the student draws, as it is at that step, to the batch's prompts.

    No gradient goes through the drawing, and nothing is dropped in it; behind the end of an answer nothing is scored.
    """

    fraction: float = Field(0.5, ge=0, le=1)
    """Probability with which a step is one of these."""
    temperature: float = Field(1.0, ge=LEAST_TEMPERATURE)
    """What logits are divided by before a token is drawn."""
    top_k: int = Field(0, ge=0)
    """Tokens that are drawn among; 0 for all."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens of an answer at most; one that comes to no end is scored as far as it goes."""

    @field_validator("fraction")
    @classmethod
    def _some(cls, fraction: float) -> float:
        if fraction == 0:
            raise ValueError("no step would be on the student's own answers; leave on_policy out")
        return fraction

    def problems(self, terms: Sequence[LossTerm]) -> Iterator[str]:
        """What is wrong with these terms on answers that are not the data's, each as ``field: what``."""
        for i, term in enumerate(terms):
            if term.needs_labels:
                yield f"terms[{i}] ({term.type}) scores the data's own tokens, and on_policy puts others in their place"
            elif isinstance(term, StateTerm) and term.numbered:
                yield f"terms[{i}] ({term.type}) keeps something of each row of the data, which on_policy changes"

    def answers(self, source: Artifact, model: nn.Module, data: Split, seed: int, precision: str) -> StudentAnswers:
        """What draws the answers of ``model``, which was made of ``source`` and trains on ``data``."""
        autocast = torch.bfloat16 if precision == "bf16" else None
        return StudentAnswers(self, TorchSubject.answering(source, model), data.model, seed, autocast)


@dataclass(frozen=True)
class StudentAnswers:
    """The student's answers in place of the data's. All of it follows from seed, step, and the student at that step."""

    config: OnPolicy
    student: TorchSubject
    interface: ModelInterface
    seed: int
    autocast: torch.dtype | None

    def chosen(self, step: int) -> bool:
        """Whether step ``step`` (from 0) is on the student's answers; the same in every process."""
        return bool(np.random.default_rng([self.seed, step]).random() < self.config.fraction)

    def batch(self, batch: Batch, step: int, part: int) -> Batch:
        """This process's rows of part ``part`` of a step, with answers of the student in evaluation mode."""
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
                answers = self.student.complete(prompts, decoding, seed)
        finally:
            model.train(training)
        return response_batch(prompts, answers, self.interface)
