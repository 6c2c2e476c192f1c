"""Write a model as a directory that torch or onnxruntime opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn

from compress.artifact import adopt
from compress.engine.exporting import write_onnx, write_torch
from compress.engine.models import Ancestry, checked, device_of, remember, undisturbed
from compress.engine.rows import require_tokenizer
from compress.errors import ModelError, UserError
from compress.onnx.export.exporter import GraphKind


def load(path: str | Path, *, device: str = "cpu", dequantize: bool = False) -> nn.Module:
    """Load a saved directory, any artifact of a recipe or a stock directory as a working torch model.

    A quantized model computes as when deployed: weights come from packed codes, and activations are quantized. A model
    that was cut remembers which units of its root are left, so terms that compare unit by unit can use it.

    Args:
        path: the directory.
        device: where the model is placed.
        dequantize: return a stock model with the dequantized weights, which any other tool can evaluate.

    Returns:
        The model in float32 and evaluation mode.

    Raises:
        ModelError: nothing is there, the family is not supported, or files are not those that were saved.

    Examples:
        >>> compress.load(compress.save(model, directory / "model")).config.n_layer
        2
    """
    artifact = adopt(path)
    model = artifact.model(device=device, dequantize=dequantize)
    manifest = artifact.manifest
    if manifest.kept or manifest.layers:
        remember(model, Ancestry(manifest.sizes, manifest.kept, manifest.layers))
    return model


def save(model: nn.Module, out: str | Path, *, tokenizer: Any = None) -> Path:
    """Save a model, quantized or cut to any shape, as a directory that :func:`compress.load` opens.

    A float model of stock shape opens with plain ``from_pretrained`` as well. A quantized model is stored as packed
    codes and scales. The directory is written whole or not at all.

    Args:
        model: a float32 model, or one that :func:`compress.quantize_` changed; without masks.
        out: a new directory.
        tokenizer: the tokenizer to store beside it.

    Returns:
        The directory.

    Raises:
        UserError: an argument that cannot be used, or a directory that is there already.

    Examples:
        >>> path = compress.save(model, directory / "saved", tokenizer=tokenizer)
        >>> compress.load(path).config.n_embd
        32
    """
    checked(model, "model", forbids=("masked",))
    require_tokenizer(tokenizer, model.config)
    return write_torch(model, out, tokenizer)


def export_onnx(
    model: nn.Module,
    out: str | Path,
    *,
    tokenizer: Any = None,
    graph: GraphKind = "decoding",
    head: Literal["tied", "split"] = "tied",
    seed: int = 0,
) -> dict[str, float]:
    """Export to ONNX with a key/value cache, and check the graph against torch before it is handed over.

    The directory follows optimum's conventions; :class:`compress.onnx.runtime.Runtime` decodes it with numpy and
    onnxruntime alone. A model that :func:`compress.quantize_` changed is exported with packed codes.

    Args:
        model: a float32 model or a quantized one, on the CPU, without masks.
        out: a new directory.
        tokenizer: the tokenizer to store beside the graph.
        graph: ``decoding`` is built from onnxruntime's fused operators; ``plain`` is what torch's exporter makes of a
            float decoder.
        head: of a quantized model with a tied head: ``split`` stores the token embedding again as float32 rows.
        seed: seed of the tokens that the check runs on.

    Returns:
        The figures of the parity gate: ``max_logit_error``, its ``limit``, ``greedy_tokens`` and others.

    Raises:
        ParityError: the graph does not compute what torch computes; nothing is left behind.
        UserError: an argument that cannot be used, a part without an ONNX form, or a directory that is there already.

    Examples:
        >>> figures = compress.export_onnx(model, directory / "onnx", tokenizer=tokenizer)
        >>> figures["max_logit_error"] <= figures["limit"]
        True
    """
    checked(model, "model", forbids=("masked",))
    require_tokenizer(tokenizer, model.config)
    if device_of(model).type != "cpu":
        raise ModelError(f"model: is on {device_of(model)}; the check compares on the CPU, so give model.cpu()")
    if graph not in ("decoding", "plain"):
        raise UserError(f"graph: {graph!r} is not known; allowed: decoding, plain")
    with undisturbed(model):
        model.eval()
        return write_onnx(model, out, tokenizer, graph=graph, seed=seed, head=head)
