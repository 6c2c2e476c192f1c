"""Export a torch model to a directory that onnxruntime opens, and check it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from compress.models.description import describe
from compress.onnx.export.causal import decoding_graph
from compress.onnx.export.graph import EXTERNAL_OVER, save, save_pair
from compress.onnx.export.parity.check import check_parity
from compress.onnx.export.plain import plain_graph
from compress.onnx.export.seq2seq import decoder_graph, encoder_graph
from compress.onnx.export.weights import read_weights
from compress.onnx.names import DECODER_FILE, ENCODER_FILE, MODEL_FILE, SHARED_FILE
from compress.surgery.quantization import QuantizationSpec

GraphKind = Literal["decoding", "plain"]


@dataclass(frozen=True)
class Packed:
    """Codes and scales of a quantized model, and the specification of its matrices."""

    spec: QuantizationSpec
    tensors: Mapping[str, Tensor]
    split: bool = False
    """Store token embeddings separately from the head, as float32 rows."""


def export(
    model: nn.Module,
    out: Path,
    *,
    packed: Packed | None = None,
    graph: GraphKind = "decoding",
    external_over: int = EXTERNAL_OVER,
    seed: int = 0,
) -> dict[str, float]:
    """Write graphs as :func:`write_graphs` does, and check them against the model. ``seed`` is for the check's tokens.

    Returns:
        The figures of :func:`check_parity`.

    Raises:
        ParityError: the graph does not compute what the model computes.
        ModelError: a part of the model cannot be exported.
    """
    write_graphs(model, out, packed=packed, graph=graph, external_over=external_over)
    return check_parity(model, out, packed.spec if packed else None, seed=seed)


def write_graphs(
    model: nn.Module,
    out: Path,
    *,
    packed: Packed | None = None,
    graph: GraphKind = "decoding",
    external_over: int = EXTERNAL_OVER,
) -> None:
    """Write ``model.onnx``, or an encoder and its decoder, beside a ``config.json`` that is already in ``out``.

    This function checks nothing; :func:`export` does.

    Args:
        model: in float32 and evaluation mode; a quantized model in its deployed form.
        out: the directory.
        packed: codes and scales that the graph of a quantized model stores instead of float weights.
        graph: ``decoding`` is built from fused operators; ``plain`` comes from torch's exporter, for float models only.
        external_over: weights of more bytes than this go to ``model.onnx_data``.

    Raises:
        ModelError: a part of the model cannot be exported.
    """
    stacks = describe(model)
    weights = read_weights(model, packed.spec, packed.tensors, split=packed.split) if packed else read_weights(model)
    if stacks.encoder is not None:
        graphs = encoder_graph(stacks.encoder, weights), decoder_graph(stacks.decoder, weights)
        files = out / ENCODER_FILE, out / DECODER_FILE
        save_pair(*graphs, files, out / SHARED_FILE, external_over=external_over)
        return
    built = plain_graph(model, stacks.decoder) if graph == "plain" else decoding_graph(stacks.decoder, weights)
    save(built, out / MODEL_FILE, external_over=external_over)
