"""The Python API: functions over models in memory. ``import compress`` gives them by name."""

from compress.api.cutting import prune
from compress.api.dropping import drop_layers
from compress.api.quantizing import quantize_
from compress.api.results import Records, benchmark, evaluate
from compress.api.saving import export_onnx, load, save
from compress.api.scoring import learn_masks, score
from compress.api.teaching import distill, finetune
from compress.api.unit_masks import Masks

__all__ = [
    "Masks",
    "Records",
    "benchmark",
    "distill",
    "drop_layers",
    "evaluate",
    "export_onnx",
    "finetune",
    "learn_masks",
    "load",
    "prune",
    "quantize_",
    "save",
    "score",
]
