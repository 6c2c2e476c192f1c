"""Whether a model can have a graph of this form. The stage ``export_onnx`` and the API ask the same questions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from compress.errors import ModelError
from compress.models.description import activation_name, require_described
from compress.onnx.export.exporter import GraphKind
from compress.onnx.export.operators import require_activation
from compress.problem import Problem


def graph_problems(
    config: Any, graph: GraphKind, head: Literal["tied", "split"], *, quantized: bool
) -> Iterator[Problem]:
    """Yield what a model with this config cannot export, and choices that would change nothing.

    The path of a problem is ``graph`` or ``head``. It is empty if the model itself has no ONNX form.
    """
    try:
        require_described(config)
        require_activation(activation_name(config))
    except ModelError as error:
        yield error.problem
    if graph == "plain" and config.is_encoder_decoder:
        yield Problem(("graph",), "plain supports only decoders; use decoding for an encoder and its decoder")
    if graph == "plain" and quantized:
        yield Problem(("graph",), "plain supports only float weights; use decoding for a quantized model")
    if head == "split" and not quantized:
        yield Problem(("head",), "split needs packed codes, but this model has none; allowed: tied")
    elif head == "split" and not config.tie_word_embeddings:
        text = "split has nothing to split, because the model's head and embedding are not tied; allowed: tied"
        yield Problem(("head",), text)
