"""From a torch model to a directory that onnxruntime opens, checked before it is handed out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from compress.models.blocks import decoder
from compress.onnx.decoding_graph import decoding_graph
from compress.onnx.graph import EXTERNAL_OVER, save
from compress.onnx.names import MODEL_FILE
from compress.onnx.parity import check_parity
from compress.onnx.plain import plain_graph
from compress.onnx.reading import read_weights
from compress.surgery.quantize import QuantizationSpec

GraphKind = Literal["decoding", "plain"]


@dataclass(frozen=True)
class Packed:
    """Codes and scales of a quantized model and what they mean."""

    spec: QuantizationSpec
    tensors: Mapping[str, Tensor]


def export(
    model: nn.Module,
    out: Path,
    *,
    packed: Packed | None = None,
    graph: GraphKind = "decoding",
    external_over: int = EXTERNAL_OVER,
    seed: int = 0,
) -> dict[str, float]:
    """Write ``model.onnx`` beside a ``config.json`` that is already in ``out``, and check it against the model.

    Args:
        model: a causal model in float32 and evaluation mode; a quantized one as it is deployed.
        out: the directory.
        packed: what a quantized model's graph stores in place of float weights.
        graph: ``decoding`` is built from fused operators; ``plain`` is what torch's exporter makes, float only.
        external_over: above this many bytes the weights go to ``model.onnx_data``.
        seed: of the tokens that the check uses.

    Returns:
        The figures of :func:`check_parity`.

    Raises:
        ParityError: the graph does not compute what the model computes.
        ModelError: the model has a part with no ONNX form.
    """
    stack = decoder(model)
    if graph == "plain":
        built = plain_graph(model, stack)
    elif packed is None:
        built = decoding_graph(stack, read_weights(model))
    else:
        built = decoding_graph(stack, read_weights(model, packed.spec, packed.tensors))
    save(built, out / MODEL_FILE, external_over=external_over)
    return check_parity(model, out, packed.spec if packed else None, seed=seed)
