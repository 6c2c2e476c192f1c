"""Read the weights of a torch model, float or packed, for a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compress.functional.packing import storage_bits
from compress.models.layout import (
    is_embedding,
    is_norm,
    is_product,
    is_rotary,
    norm_epsilon,
    norm_kind,
    rotary_tables,
    weight_of,
)
from compress.onnx.export.weights import FloatMatrix, Matrix, Norm, PackedMatrix, Weights
from compress.surgery.quantization import MatrixSpec, QuantizationSpec, Table


def read_weights(
    model: nn.Module,
    spec: QuantizationSpec | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    split: bool = False,
) -> Weights:
    """Weights of a stock model. Codes, scales and float16 tables that ``spec`` names are read from ``tensors``.

    Modules that share one parameter share one stored weight. With ``split``, token embeddings are stored separately as
    dequantized float32 rows.
    """
    names: dict[int, str] = {}
    matrices: dict[str, Matrix] = {}
    norms: dict[str, Norm] = {}
    rotary: dict[str, tuple[Any, Any]] = {}
    vectors: dict[str, Any] = {}
    for name, module in model.named_modules():
        if is_product(module) or is_embedding(module):
            stored = names.setdefault(id(module.get_parameter("weight")), f"{name}.weight")
            values = module.weight if is_embedding(module) else weight_of(module)
            matrices[name] = FloatMatrix(stored, values.detach().cpu().numpy())
        elif is_norm(module):
            norms[name] = Norm(norm_epsilon(module), centred=norm_kind(module) == "layer")
        elif is_rotary(module):
            cosines, sines = rotary_tables(module)
            rotary[name] = cosines.numpy(), sines.numpy()
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                vectors[f"{name}.{part}"] = parameter.detach().cpu().numpy()
    for name, buffer in model.named_buffers():
        if buffer.ndim == 2 and len(buffer) == 1:  # the bias of the logits, stored as one row
            vectors[name] = buffer.detach().cpu().numpy()[0]
    if spec is not None and tensors is not None:
        matrices |= _quantized(model, spec, tensors, split=split)
    return Weights(matrices, vectors, norms, rotary)


def _quantized(
    model: nn.Module, spec: QuantizationSpec, tensors: Mapping[str, Tensor], *, split: bool
) -> Mapping[str, Matrix]:
    """The matrices that replace the model's own: float16 tables, codes, and separately stored rows."""
    halved = {name.removesuffix(".weight"): FloatMatrix(name, tensors[name].numpy()) for name in spec.half}
    coded = {matrix.module: _packed(matrix, tensors) for matrix in spec.matrices}
    apart = [matrix for matrix in spec.matrices if split and isinstance(model.get_submodule(matrix.module), Table)]
    return halved | coded | {matrix.module: _rows(matrix, model) for matrix in apart}


def _packed(matrix: MatrixSpec, tensors: Mapping[str, Tensor]) -> PackedMatrix:
    owner = matrix.shares or matrix.module
    codes, scales = (tensors[f"{owner}.{part}"].numpy() for part in ("codes", "scale"))
    bits, float_inputs = storage_bits(matrix.bits), matrix.activations == "none"
    return PackedMatrix(owner, codes, scales, bits, matrix.block, matrix.shape[1], float_inputs)


def _rows(matrix: MatrixSpec, model: nn.Module) -> FloatMatrix:
    weight = model.get_submodule(matrix.module).get_submodule("quantizer").get_parameter("weight")
    return FloatMatrix(f"{matrix.shares or matrix.module}.rows", weight.detach().cpu().numpy())
