"""A stage: round weights to what float16 holds, for a runtime that stores them so."""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from compress.artifact import Artifact, save_model
from compress.stages.stage import Context, Result, Stage
from compress.surgery.coverage import Coverage


class RoundToHalf(Stage):
    """Round every weight to the nearest number that float16 holds; it stays stored as float32."""

    type: Literal["round_to_half"] = "round_to_half"

    forbids: ClassVar[frozenset[str]] = frozenset({"masked", "quantized", "onnx", "bitsandbytes"})

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        """Write the rounded model into ``out``."""
        model = source.model()
        coverage = rounded(model)
        coverage.require(self.name or self.type)
        save_model(model, source, out)
        return Result(traits=source.traits, coverage=coverage, kept=source.manifest.kept)


@torch.no_grad()
def rounded(model: nn.Module) -> Coverage:
    """Round the weights of a model in place, and count those that changed."""
    changed = {}
    for name, parameter in model.named_parameters():
        half = parameter.half().float()
        changed[name] = int((half != parameter).sum())
        parameter.copy_(half)
    everything = Coverage.of_training(model)
    touched = {name.rpartition(".")[0] for name, count in changed.items() if count}
    return everything.model_copy(update={"modules_touched": len(touched), "parameters_touched": sum(changed.values())})
