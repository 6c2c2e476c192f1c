"""The schema of ``artifact.json``, and the hashes of the files that it describes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from compress.files import sha256
from compress.schema import Strict, added
from compress.surgery.quantization import QuantizationSpec

MANIFEST = "artifact.json"
MASKS = "masks.safetensors"
QUANTIZED = "quantized.safetensors"
TARGETS = "targets.jsonl"
"""Rows of a source and the target that a model generated for it. An artifact with this file holds no model."""
NOTES = ("history.jsonl", "details.json")
"""Optional files in which a stage reports on its run. They are hashed, but are not part of the digest."""


class Step(Strict):
    """One stage in an artifact's lineage: its config, its inputs and its effect."""

    stage: str
    type: str
    version: int
    config: dict[str, Any]
    seed: int
    inputs: dict[str, str]
    packages: dict[str, str]
    seconds: float
    coverage: dict[str, Any] | None = None
    metrics: dict[str, float] = Field(default_factory=dict)


class Manifest(Strict):
    """The content of ``artifact.json``.

    The root is the original model that this one was made from. An axis is a prunable dimension, such as the heads of a
    layer, and its units are the single heads. ``layers`` is a dict from stack (encoder or decoder) to the layers of the
    root that are left; a stack that is not in it has all its layers. ``sizes`` is a dict from axis name to the number
    of units in the root, and ``kept`` from axis name to the units that are left; an axis that is not in ``kept`` has
    all its units. Axis names in ``sizes`` and ``kept`` use the layer numbers of this model, not those of the root.
    """

    format: Literal[1] = 1
    family: str
    task: Literal["causal", "seq2seq"]
    traits: tuple[str, ...] = ()
    root: str
    sizes: dict[str, int]
    kept: dict[str, list[int]] = Field(default_factory=dict)
    layers: dict[str, list[int]] = added({})
    quantization: QuantizationSpec | None = None
    lineage: tuple[Step, ...] = ()
    files: dict[str, str]
    digest: str


def hashes_of(directory: Path) -> dict[str, str]:
    """Hash the files directly in the directory. Files in subdirectories, such as runs started there, are ignored."""
    return {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.is_file() and path.name != MANIFEST}


def content_digest(directory: Path, files: Mapping[str, str]) -> str:
    """Hash everything that determines the outputs of a model: tensors, codes, masks, graphs, targets and config."""
    kinds = (".safetensors", ".onnx", ".onnx_data", TARGETS)
    content = {name: digest for name, digest in files.items() if name.endswith(kinds)}
    config = json.loads((directory / "config.json").read_text())
    for volatile in ("transformers_version", "_name_or_path"):
        config.pop(volatile, None)
    content["config.json"] = json.dumps(config, sort_keys=True)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
