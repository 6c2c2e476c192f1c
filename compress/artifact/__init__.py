"""Artifacts. Each is a standard transformers directory plus ``artifact.json``, written completely or not at all."""

from compress.artifact.manifest import MANIFEST, MASKS, NOTES, QUANTIZED, TARGETS, Manifest, Step
from compress.artifact.reading import Artifact, adopt, adopt_deployed
from compress.artifact.writing import save_masks, save_model, seal, seal_root, stock_state

__all__ = [
    "MANIFEST",
    "MASKS",
    "NOTES",
    "QUANTIZED",
    "TARGETS",
    "Artifact",
    "Manifest",
    "Step",
    "adopt",
    "adopt_deployed",
    "save_masks",
    "save_model",
    "seal",
    "seal_root",
    "stock_state",
]
