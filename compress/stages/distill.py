"""Train a student to match a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from compress.artifact import Artifact
from compress.engine.term_checks import term_problems
from compress.generation.on_policy import OnPolicy
from compress.problem import Problem
from compress.schema import added
from compress.stages.fitting import TaughtStage, Terms, Training, finished, fit, require_ancestor, side
from compress.stages.stage import Context, Result, Shape
from compress.terms.logits import AdaptiveKL


class Distill(TaughtStage):
    """Minimise a weighted sum of terms between student and teacher. The default term is adaptive KL over logits.

    With ``on_policy`` some steps train on the student's own responses to the prompts or sources of the data.
    """

    type: Literal["distill"] = "distill"
    teacher: str
    terms: Terms = (AdaptiveKL(),)
    train: Training
    on_policy: OnPolicy | None = added(None)

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        teacher = context.models[self.teacher]
        require_ancestor(self.terms, source, teacher)
        model = source.model(device=context.device)
        name, context = self.name or self.type, context.trained_on(self.targets)
        own = None
        if self.on_policy:
            own = self.on_policy.responses(source, model, context.train(name), context.seed, self.train.precision)
        trained = fit(side(source, model), self.terms, self.train, out, context, name=name, teacher=teacher, own=own)
        return finished(source, model, out, trained.metrics)

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[Problem]:
        yield from term_problems(self.terms, source, teacher)
        if self.on_policy:
            yield from self.on_policy.problems(self.terms)
            if self.targets and self.on_policy.fraction == 1:
                yield Problem(("targets",), f"{self.targets!r} would not be read, because on_policy.fraction is 1")
