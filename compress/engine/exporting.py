"""Write a model in memory as a sealed directory: a torch artifact, or an ONNX one that was compared with torch."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import nn

from compress.artifact import QUANTIZED, seal_root, stock_state
from compress.engine.models import ancestry_of, traits_of
from compress.errors import UserError
from compress.files import PARTIAL
from compress.models import family_of
from compress.models.family import ModelFamily
from compress.models.loading import build, save_config, save_tokenizer
from compress.onnx.export.exporter import GraphKind, Packed, export
from compress.surgery.cut import cut_to_sizes
from compress.surgery.quantization import QuantizationSpec, packed_state, restore


@contextmanager
def new_directory(out: str | Path, name: str = "out") -> Iterator[tuple[Path, Path]]:
    """Yield a partial directory and the final path that it is renamed to. If the work fails, nothing is left.

    Raises UserError if the path exists and is not an empty directory, or if the directory cannot be created.
    """
    final = Path(out).resolve()  # "missing/.." exists only once "missing" does, and then it is another directory
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise UserError(f"{name}: {final} exists already; give a new directory")
    partial = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")  # never a directory of the user
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{name}: {final} cannot be created ({error.strerror})") from None
    try:
        yield partial, final
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def same_shape(model: nn.Module, family: ModelFamily) -> nn.Module:
    """Return a transformers model with random weights and the sizes of this one, even if no config can express them."""
    empty = build(model.config)
    known = ancestry_of(model, family)
    now = {axis: len(known.kept.get(axis, range(size))) for axis, size in known.sizes.items()}
    cut_to_sizes(empty, family, now)
    return empty


def deployed(model: nn.Module, family: ModelFamily) -> tuple[nn.Module, Packed | None]:
    """Return the model as it is deployed, in evaluation mode, and its packed tensors if it is quantized."""
    if "quantized" not in traits_of(model):
        return model, None
    tensors, spec = packed_state(model)
    restored = same_shape(model, family)
    restore(restored, family, spec, tensors, dequantize=False)
    return restored.eval(), Packed(spec, tensors)


def write_torch(model: Any, out: str | Path, tokenizer: Any) -> Path:
    """Save a model as a directory that ``compress.load`` opens. transformers opens it if a config has its sizes."""
    family = family_of(model.config)
    with new_directory(out) as (partial, final):
        _write_settings(model, tokenizer, partial)
        spec = None
        if "quantized" in traits_of(model):
            tensors, spec = packed_state(model)
            save_file(tensors, partial / QUANTIZED)
        else:
            save_file(stock_state(model), partial / "model.safetensors", metadata={"format": "pt"})
        _seal(model, family, partial, final, traits=traits_of(model), spec=spec)
    return final


def write_onnx(
    model: Any, out: str | Path, tokenizer: Any, *, graph: GraphKind, seed: int, head: Literal["tied", "split"]
) -> dict[str, float]:
    """Export a model, compare it with torch, and seal it. Return the values of the comparison."""
    family = family_of(model.config)
    with new_directory(out) as (partial, final):
        _write_settings(model, tokenizer, partial)
        working, packed_model = deployed(model, family)
        if packed_model is not None:
            packed_model = Packed(packed_model.spec, packed_model.tensors, split=head == "split")
        figures = export(working, partial, packed=packed_model, graph=graph, seed=seed)
        spec = packed_model.spec if packed_model else None
        _seal(model, family, partial, final, traits=traits_of(model) | {"onnx"}, spec=spec)
    return figures


def _write_settings(model: Any, tokenizer: Any, out: Path) -> None:
    save_config(model, out)
    if tokenizer is not None:
        save_tokenizer(tokenizer, out)


def _seal(
    model: nn.Module,
    family: ModelFamily,
    partial: Path,
    final: Path,
    *,
    traits: frozenset[str],
    spec: QuantizationSpec | None,
) -> None:
    known = ancestry_of(model, family)
    seal_root(
        partial,
        final,
        family=family,
        traits=sorted(traits),
        sizes=dict(known.sizes),
        kept={axis: list(units) for axis, units in known.kept.items()},
        layers={stack: list(left) for stack, left in known.layers.items()},
        quantization=spec,
    )
