"""Train a model on data, without a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from compress.artifact import Artifact
from compress.engine.term_checks import term_problems
from compress.problem import Problem
from compress.stages.fitting import Terms, Training, TrainingStage, finished, fit, side
from compress.stages.stage import Context, Result, Shape
from compress.terms.logits import CrossEntropy


class Finetune(TrainingStage):
    """Minimise the cross-entropy of the tokens of the data. A teacher or a control model is trained this way too."""

    type: Literal["finetune"] = "finetune"
    terms: Terms = (CrossEntropy(),)
    train: Training

    @model_validator(mode="after")
    def _without_teacher(self) -> Finetune:
        for term in self.terms:
            if term.needs_teacher:
                raise ValueError(f"term {term.type} needs a teacher; use a distill stage")
        return self

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        model = source.model(device=context.device)
        name = self.name or self.type
        trained = fit(side(source, model), self.terms, self.train, out, context.trained_on(self.targets), name=name)
        return finished(source, model, out, trained.metrics)

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[Problem]:
        yield from term_problems(self.terms, source, teacher)
