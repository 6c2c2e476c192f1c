"""Size of artifacts on disk, and their number of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from compress.artifact import Artifact
from compress.data import Data
from compress.measure.measurement import Measurement
from compress.models.loading import build
from compress.models.structure import count_parameters


class Size(Measurement):
    """Bytes and parameters. A megabyte is 2^20 bytes everywhere in this project.

    ``bytes`` counts model files (``*.safetensors`` and ``*.onnx*``). ``bytes_total`` counts every file of the
    directory. ``parameters`` is the number of values of the float model. It counts shared tensors once and includes
    saved buffers. Quantization changes bytes but not parameters. ``compression_ratio`` = 4 x parameters of the base /
    bytes, which compares with the float32 weights of the base. ``compression_ratio_fp16`` = 2 x parameters of the base
    / bytes. The base is the first model of the run.
    """

    type: Literal["size"] = "size"

    def run(
        self, artifacts: Mapping[str, Artifact], *, data: Data | None, device: str, console: Console | None
    ) -> dict[str, dict[str, Any]]:
        base = logical_parameters(next(iter(artifacts.values())))
        return {name: size_of(artifact, base) for name, artifact in self.chosen(artifacts).items()}


def size_of(artifact: Artifact, base_parameters: int) -> dict[str, Any]:
    """Return the record of one artifact."""
    files = {path.relative_to(artifact.path).as_posix(): path.stat().st_size for path in _files(artifact.path)}
    model_bytes = sum(size for name, size in files.items() if _is_model_file(Path(name)))
    return {
        "parameters": logical_parameters(artifact),
        "bytes": model_bytes,
        "bytes_total": sum(files.values()),
        "compression_ratio": 4 * base_parameters / model_bytes,
        "compression_ratio_fp16": 2 * base_parameters / model_bytes,
        "files": files,
    }


def logical_parameters(artifact: Artifact) -> int:
    """Count the parameters of the float model with the units that the artifact kept, without loading weights."""
    with torch.device("meta"):
        model = build(artifact.config())
    return int(count_parameters(model, artifact.family().axes(artifact.config()), artifact.sizes()))


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file())


def _is_model_file(path: Path) -> bool:
    return path.suffix == ".safetensors" or ".onnx" in path.name
