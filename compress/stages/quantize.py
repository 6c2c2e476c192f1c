"""Quantize weights, embedding and activations: with training (QAT), or without (``train: {steps: 0}``)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.artifact import QUANTIZED, Artifact
from compress.engine.term_checks import term_problems
from compress.models.family import ModelFamily
from compress.models.stock_files import copy_settings
from compress.models.structure import stock_tensors
from compress.problem import Problem
from compress.schema import added
from compress.stages.fitting import TaughtStage, Terms, fit, require_ancestor, side
from compress.stages.stage import Context, Result, Shape
from compress.surgery.quantization import (
    ActivationQuantization,
    EmbeddingQuantization,
    Quantization,
    Storage,
    WeightQuantization,
    histograms,
    left_in_float32,
    mean_cosine,
    packed_bytes,
    packed_state,
    plan,
    quantize,
    weights_and_scales,
)
from compress.terms.logits import ForwardKL
from compress.terms.token_contrastive import TokenContrastive

SAMPLE = 1024
"""Number of embedding rows used for the mean cosine similarity."""


class Quantize(TaughtStage):
    """Quantize with module-wise dynamic scaling (QuantGPT, Tao et al. 2022) or a baseline. The result is packed codes.

    The default terms are the paper's: distillation on the logits, and token-level contrastive distillation with
    weight 0.1.
    """

    type: Literal["quantize"] = "quantize"
    weights: WeightQuantization
    embedding: EmbeddingQuantization
    activations: ActivationQuantization | None = ActivationQuantization()
    noise_p: float = Field(1.0, ge=0, le=1)
    store: Storage = added(Storage())
    terms: Terms = (ForwardKL(), TokenContrastive(weight=0.1))

    gives: ClassVar[frozenset[str]] = frozenset({"quantized"})
    version: ClassVar[int] = 2

    @model_validator(mode="after")
    def _agrees(self) -> Quantize:
        self.quantization()
        if self.weights.norm_gradient and self.train.steps == 0:
            raise ValueError("weights.norm_gradient needs training, but train.steps is 0")
        return self

    def quantization(self) -> Quantization:
        """Return the settings that the quantization of the model needs."""
        return Quantization(
            weights=self.weights,
            embedding=self.embedding,
            activations=self.activations,
            noise_p=self.noise_p,
            store=self.store,
        )

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        teacher = self.taught_by(context)
        require_ancestor(self.terms, source, teacher)
        family = source.family()
        model = source.model(device=context.device)
        elements = sum(tensor.numel() for tensor in stock_tensors(model))
        crowding = {"source": _crowding(model, family)}
        intended = plan(model, family, self.quantization())
        coverage = quantize(model, family, self.quantization(), intended)
        weights, scales = weights_and_scales(model)
        trained = fit(
            side(source, model),
            self.terms,
            self.train,
            out,
            context.trained_on(self.targets if self.train.steps != 0 else None),
            name=self.name or self.type,
            teacher=teacher,
            groups={"weights": weights, "scales": scales},
        )
        model.eval()
        state, spec = packed_state(model, intended)
        if wide := left_in_float32(intended, spec):
            note = f"{coverage.note}; " if coverage.note else ""
            note += f"float16 cannot represent {', '.join(wide)}; stored as float32"
            coverage = coverage.model_copy(update={"bytes_after": packed_bytes(spec, elements), "note": note})
        copy_settings(source.path, out)
        save_file(state, out / QUANTIZED)
        crowding["quantized"] = _crowding(model, family)
        details = {"histograms": histograms(model), "embedding_cosine": crowding}
        (out / "details.json").write_text(json.dumps(details))
        metrics = {
            **trained.metrics,
            "bytes_without_scales": float(packed_bytes(spec, elements, scales=False)),
            "embedding_cosine": crowding["quantized"],
            "embedding_cosine_source": crowding["source"],
        }
        return Result(
            traits=self.traits_after(source.traits),
            coverage=coverage,
            kept=source.manifest.kept,
            quantization=spec,
            metrics=metrics,
        )

    def shape(self, source: Shape) -> Shape:
        activations = self.activations.granularity if self.activations else "none"
        return replace(super().shape(source), activations=activations)

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[Problem]:
        if self.train.steps != 0:
            yield from term_problems(self.terms, source, teacher)


@torch.no_grad()
def _crowding(model: nn.Module, family: ModelFamily) -> float:
    embedding: Any = model.get_submodule(family.embeddings[-1])
    vocabulary = len(embedding.weight)
    ids = torch.linspace(0, vocabulary - 1, min(SAMPLE, vocabulary), device=embedding.weight.device).long()
    rows: Tensor = embedding(ids)
    return mean_cosine(rows.cpu())
