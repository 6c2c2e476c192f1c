"""Train a model on data alone."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import model_validator

from compress.artifact import Artifact
from compress.stages.fitting import Terms, finished, fit, side
from compress.stages.stage import Context, Result, Stage
from compress.terms.logits import CrossEntropy
from compress.training import TrainConfig


class Finetune(Stage):
    """Minimise the cross-entropy of the data's own tokens; also how a teacher or a control is trained."""

    type: Literal["finetune"] = "finetune"
    terms: Terms = (CrossEntropy(),)
    train: TrainConfig

    forbids: ClassVar[frozenset[str]] = frozenset({"masked", "quantized", "onnx", "bitsandbytes"})
    trains: ClassVar[bool] = True

    @model_validator(mode="after")
    def _without_teacher(self) -> Finetune:
        for term in self.terms:
            if term.needs_teacher:
                raise ValueError(f"term {term.type} needs a teacher; use a distill stage")
        return self

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        model = source.model(device=context.device)
        trained = fit(side(source, model), self.terms, self.train, out, context, name=self.name or self.type)
        return finished(source, model, out, trained.metrics)
