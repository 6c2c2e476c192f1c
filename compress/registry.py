"""Names a recipe may use, and the classes behind them.

Built-ins are import paths, so that listing names imports nothing. Other packages add names through entry points.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic_core import PydanticCustomError

from compress.errors import RecipeError


@dataclass(frozen=True)
class Registry:
    """All parts of one kind (``stage``, ``term``, ``measurement``, ``metric``). A recipe chooses among them by name."""

    kind: str
    group: str
    builtin: Mapping[str, str]

    @cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def names(self) -> list[str]:
        """Return every known name: the built-ins in their declared order, then plug-ins in alphabetical order."""
        return list(self.builtin) + sorted(set(self._plugins) - set(self.builtin))

    def get(self, name: object) -> Any:
        """Return the class called ``name``. Raises RecipeError, with the nearest known name, if there is none."""
        if isinstance(name, str):
            if path := self.builtin.get(name):
                module, attribute = path.split(":")
                return getattr(import_module(module), attribute)
            if point := self._plugins.get(name):
                return point.load()
        raise RecipeError(f"unknown {self.kind} {name!r}. {suggest(name, self.names())}")

    def known(self, name: str) -> str:
        """Return ``name`` if it is known, otherwise raise ValueError. For pydantic fields that hold only a name."""
        if name not in self.names():
            raise ValueError(f"unknown {self.kind} {name!r}. {suggest(name, self.names())}")
        return name

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """JSON schema of a field: a name, or a mapping with the fields of the class that its ``type`` names."""
        known = [handler(self.get(name).__pydantic_core_schema__) for name in self.names()]
        return {"anyOf": [{"enum": self.names()}, {"required": ["type"], "anyOf": known}]}

    def read(self, value: object) -> Any:
        """Validate ``{type: NAME, ...}`` or ``NAME`` as the class called NAME. For pydantic fields."""
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, Mapping):
            return value
        if "type" not in value:
            text = f"a {self.kind} is written as {{type: NAME, ...}}. Known: {', '.join(self.names())}"
            raise PydanticCustomError("no_type", "{text}", {"text": text})
        try:
            chosen = self.get(value["type"])
        except RecipeError as error:
            raise PydanticCustomError("unknown_type", "{text}", {"text": error.problem.text}) from None
        return chosen.model_validate(value)


def suggest(name: object, known: Iterable[str]) -> str:
    """Return a hint with the closest known name, and the list of all known names."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(known) or 'none'}"


STAGES = Registry(
    kind="stage",
    group="compress.stages",
    builtin={
        "finetune": "compress.stages.finetune:Finetune",
        "distill": "compress.stages.distill:Distill",
        "learn_masks": "compress.stages.learn_masks:LearnMasks",
        "prune": "compress.stages.prune:Prune",
        "drop_layers": "compress.stages.drop_layers:DropLayers",
        "quantize": "compress.stages.quantize:Quantize",
        "seq_kd": "compress.stages.seq_kd:SeqKd",
        "bitsandbytes": "compress.stages.bitsandbytes:BitsAndBytes",
        "export_onnx": "compress.stages.export_onnx:ExportOnnx",
    },
)

TERMS = Registry(
    kind="term",
    group="compress.terms",
    builtin={
        "cross_entropy": "compress.terms.logits:CrossEntropy",
        "forward_kl": "compress.terms.logits:ForwardKL",
        "reverse_kl": "compress.terms.logits:ReverseKL",
        "adaptive_kl": "compress.terms.logits:AdaptiveKL",
        "jensen_shannon": "compress.terms.logits:JensenShannon",
        "skew_forward_kl": "compress.terms.logits:SkewForwardKL",
        "skew_reverse_kl": "compress.terms.logits:SkewReverseKL",
        "total_variation": "compress.terms.logits:TotalVariation",
        "token_contrastive": "compress.terms.token_contrastive:TokenContrastive",
        "hidden_mse": "compress.terms.hidden_mse:HiddenMSE",
        "causal_kv": "compress.terms.causal_kv:CausalKV",
        "attention_relation": "compress.terms.attention_relation:AttentionRelation",
        "mask_l1": "compress.terms.mask_l1:MaskL1",
    },
)

MEASUREMENTS = Registry(
    kind="measurement",
    group="compress.measurements",
    builtin={
        "size": "compress.measure.size:Size",
        "quality": "compress.measure.quality:Quality",
        "speed": "compress.measure.speed:Speed",
    },
)

METRICS = Registry(
    kind="metric",
    group="compress.metrics",
    builtin={
        "perplexity": "compress.measure.metrics.perplexity:PERPLEXITY",
        "agreement": "compress.measure.metrics.agreement:AGREEMENT",
        "rouge": "compress.measure.metrics.rouge:ROUGE",
        "bleu": "compress.measure.metrics.bleu:BLEU",
        "chrf": "compress.measure.metrics.chrf:CHRF",
        "exact_match": "compress.measure.metrics.exact_match:EXACT_MATCH",
        "length": "compress.measure.metrics.length:LENGTH",
        "distinct": "compress.measure.metrics.distinct:DISTINCT",
    },
)

QUANTIZERS = Registry(
    kind="quantizer",
    group="compress.quantizers",
    builtin={
        "dynamic_scaling": "compress.surgery.quantization.methods:DYNAMIC_SCALING",
        "pact": "compress.surgery.quantization.methods:PACT",
        "lsq": "compress.surgery.quantization.methods:LSQ",
        "laq": "compress.surgery.quantization.methods:LAQ",
        "twn": "compress.surgery.quantization.methods:TWN",
        "round_to_nearest": "compress.surgery.quantization.methods:ROUND_TO_NEAREST",
    },
)
