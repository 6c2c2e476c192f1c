"""Write a model as a directory that torch or onnxruntime opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from compress.api.arguments import opened, require_choice, require_device, require_flag, require_path, require_seed
from compress.artifact import Artifact
from compress.engine.exporting import write_onnx, write_torch
from compress.engine.graph_checks import graph_problems
from compress.engine.models import Ancestry, checked, device_of, remember, traits_of, undisturbed
from compress.engine.rows import require_tokenizer
from compress.errors import ModelError, UserError
from compress.models.loading import read_generation_settings
from compress.onnx.export.exporter import GraphKind
from compress.surgery.quantization import Product


def load(path: str | Path, *, device: str | torch.device = "cpu", dequantize: bool = False) -> nn.Module:
    """Load a saved directory, any artifact of a recipe or a stock directory as a working torch model.

    A quantized model computes as when deployed: weights come from packed codes, and activations are quantized. What has
    no codes (biases, normalizations, positions) can be trained further; the codes stay as they are. The model can be
    saved and exported again. A model that was cut remembers which units of its root are left, so terms that compare
    unit by unit can use it.

    Args:
        path: the directory.
        device: where the model is placed, such as ``"cuda:1"``.
        dequantize: of a quantized directory, return a stock model with the dequantized weights, which any other tool
            can evaluate.

    Returns:
        The model in float32 and evaluation mode.

    Raises:
        UserError: an argument that cannot be used.
        ModelError: nothing is there, the family is not supported, or files are not those that were saved.

    Examples:
        >>> compress.load(compress.save(model, directory / "model")).config.n_layer
        2
    """
    require_flag(dequantize, "dequantize")
    place, artifact = require_device(device), opened(path, "path")
    if dequantize and artifact.manifest.quantization is None:
        raise UserError(f"dequantize: would change nothing, {artifact.path} holds no packed codes; leave it out")
    return _loaded(artifact, place, dequantize=dequantize)


def _loaded(artifact: Artifact, device: str = "cpu", *, dequantize: bool = False) -> nn.Module:
    model = artifact.model(device=device, dequantize=dequantize)
    read_generation_settings(model, artifact.path)
    manifest = artifact.manifest
    if manifest.kept or manifest.layers:
        remember(model, Ancestry(manifest.sizes, manifest.kept, manifest.layers))
    return model


def save(model: nn.Module, out: str | Path, *, tokenizer: Any = None) -> Path:
    """Save a model, quantized or cut to any shape, as a directory that :func:`compress.load` opens.

    A float model of stock shape opens with plain ``from_pretrained`` as well. A quantized model is stored as packed
    codes and scales; one that :func:`load` opened keeps its codes bit for bit. The directory is written whole or not at
    all.

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
    return write_torch(model, require_path(out, "out"), tokenizer)


def export_onnx(
    model: nn.Module | str | Path,
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
        model: a float32 model or a quantized one, on the CPU, without masks; or a directory that :func:`load` opens.
        out: a new directory.
        tokenizer: the tokenizer to store beside the graph; a directory brings its own.
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
    require_choice(graph, "graph", ("decoding", "plain"))
    require_choice(head, "head", ("tied", "split"))
    require_seed(seed)
    final = require_path(out, "out")
    if not isinstance(model, nn.Module):
        artifact = opened(model, "model")
        model, tokenizer = _loaded(artifact), artifact.tokenizer() if tokenizer is None else tokenizer
    checked(model, "model", forbids=("masked",))
    require_tokenizer(tokenizer, model.config)
    if device_of(model).type != "cpu":
        raise ModelError(f"model: is on {device_of(model)}; the check compares on the CPU, so give model.cpu()")
    _require_form(model, graph, head)
    with undisturbed(model):
        model.eval()
        return write_onnx(model, final, tokenizer, graph=graph, seed=seed, head=head)


def _require_form(model: Any, graph: GraphKind, head: Literal["tied", "split"]) -> None:
    """Refuse a graph that this model cannot have, and a choice that would change nothing."""
    found = graph_problems(model.config, graph, head, quantized="quantized" in traits_of(model))
    if problem := next(found, None):
        raise UserError(problem if problem.path else problem.inside("model"))
    inputs = {module.spec.activations for module in model.modules() if isinstance(module, Product)}
    if inputs - {"none", "block"}:
        raise ModelError(
            "model: quantizes the inputs of linear layers per tensor, which no kernel computes; allowed: activations "
            "with granularity: block, float inputs, or the stage export_onnx with activations: replace or float"
        )
