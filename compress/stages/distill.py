"""Train a student to match a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from compress.artifact import Artifact
from compress.stages.fitting import Terms, Training, finished, fit, require_ancestor, side, term_problems
from compress.stages.stage import Context, Result, Shape, Stage
from compress.terms.logits import AdaptiveKL


class Distill(Stage):
    """Minimise a weighted sum of terms between student and teacher; adaptive KL over logits by default."""

    type: Literal["distill"] = "distill"
    teacher: str
    terms: Terms = (AdaptiveKL(),)
    train: Training

    forbids: ClassVar[frozenset[str]] = frozenset({"masked", "quantized", "onnx", "bitsandbytes"})
    trains: ClassVar[bool] = True

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        teacher = context.models[self.teacher]
        require_ancestor(self.terms, source, teacher)
        model = source.model(device=context.device)
        name = self.name or self.type
        trained = fit(side(source, model), self.terms, self.train, out, context, name=name, teacher=teacher)
        return finished(source, model, out, trained.metrics)

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[str]:
        yield from term_problems(self.terms, source, teacher)
