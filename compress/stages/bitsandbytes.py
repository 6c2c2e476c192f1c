"""A baseline that needs no training: bitsandbytes through transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from compress.artifact import Artifact
from compress.models import family_of
from compress.models.bnb import QuantType, bitsandbytes_products, load_bitsandbytes
from compress.models.loading import build
from compress.models.stock_files import copy_settings
from compress.models.structure import stock_tensors
from compress.problem import Problem
from compress.stages.stage import Context, Result, Shape, Stage
from compress.surgery.coverage import Coverage, owners

BLOCK = 64
"""Number of 4-bit weights that share a scale. With widths that are not multiples of it, bitsandbytes builds models that
cannot compute on a CPU."""


class BitsAndBytes(Stage):
    """Quantize the linear layers without training: ``nf4``, ``fp4`` (QLoRA, arXiv 2305.14314) or ``int8`` (LLM.int8,
    arXiv 2208.07339).

    Token embeddings and a tied head stay float32. The result can be loaded, but no other stage accepts it.
    """

    type: Literal["bitsandbytes"] = "bitsandbytes"
    quant_type: QuantType = "nf4"

    renamed: ClassVar[Mapping[str, str]] = {"scheme": "quant_type"}

    forbids: ClassVar[frozenset[str]] = frozenset({"masked", "quantized", "onnx", "bitsandbytes"})
    gives: ClassVar[frozenset[str]] = frozenset({"bitsandbytes"})

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        model = load_bitsandbytes(source.path, self.quant_type, device=context.device)
        coverage = _coverage(model, source)
        coverage.require(f"bitsandbytes ({self.quant_type})")
        copy_settings(source.path, out)
        model.save_pretrained(out, safe_serialization=True)
        return Result(traits=self.traits_after(source.traits), coverage=coverage, kept=source.manifest.kept)

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[Problem]:
        if family_of(source.config).uniform_config(source.config, source.sizes) is None:
            text = "bitsandbytes loads with the transformers classes, which cannot express these sizes; prune uniformly"
            yield Problem((), text)
        if self.quant_type == "int8":
            return
        for axis in family_of(source.config).axes(source.config):
            if (width := source.sizes[axis.name] * axis.slots[0].width) % BLOCK:
                text = f"{self.quant_type} needs widths that are multiples of {BLOCK}, and {axis.name} is {width} wide"
                yield Problem(("quant_type",), f"{text}; use int8")


def _coverage(model: Any, source: Artifact) -> Coverage:
    with torch.device("meta"):
        stock = build(source.config())
    touched = bitsandbytes_products(model)
    held = {
        id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, torch.Tensor)
    }
    return Coverage(
        modules_touched=len(touched),
        modules_total=len(owners(stock)),
        parameters_touched=sum(module.in_features * module.out_features for module in touched),
        parameters_total=sum(parameter.numel() for parameter in stock.parameters()),
        bytes_before=sum(4 * tensor.numel() for tensor in stock_tensors(stock)),
        bytes_after=sum(tensor.numel() * tensor.element_size() for tensor in held.values()),
    )
