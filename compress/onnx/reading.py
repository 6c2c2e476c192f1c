"""The weights of a torch model, float or packed, in the form that graphs take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compress.functional.packing import storage_bits
from compress.models.layout import is_embedding, is_norm, is_product, weight_of
from compress.onnx.weights import FloatMatrix, Matrix, PackedMatrix, Weights
from compress.surgery.quantize import MatrixSpec, QuantizationSpec


def read_weights(
    model: nn.Module, spec: QuantizationSpec | None = None, tensors: Mapping[str, Tensor] | None = None
) -> Weights:
    """Weights of a stock model; where ``spec`` names a module, the codes and scales in ``tensors`` in place of its own,
    and the float16 numbers that it names.

    Modules that share one parameter share one stored weight.
    """
    names: dict[int, str] = {}
    matrices: dict[str, Matrix] = {}
    epsilons: dict[str, float] = {}
    vectors: dict[str, Any] = {}
    for name, module in model.named_modules():
        if is_product(module) or is_embedding(module):
            stored = names.setdefault(id(module.get_parameter("weight")), f"{name}.weight")
            values = module.weight if is_embedding(module) else weight_of(module)
            matrices[name] = FloatMatrix(stored, values.detach().cpu().numpy())
        elif is_norm(module):
            epsilons[name] = module.eps
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                vectors[f"{name}.{part}"] = parameter.detach().cpu().numpy()
    for name, buffer in model.named_buffers():
        if buffer.ndim == 2 and len(buffer) == 1:  # a bias of logits, stored as a row
            vectors[name] = buffer.detach().cpu().numpy()[0]
    if spec is not None and tensors is not None:
        for name in spec.half:
            module = name.removesuffix(".weight")
            matrices[module] = FloatMatrix(name, tensors[name].numpy())
        matrices |= {matrix.module: _packed(matrix, tensors) for matrix in spec.matrices}
    return Weights(matrices, vectors, epsilons)


def _packed(matrix: MatrixSpec, tensors: Mapping[str, Tensor]) -> PackedMatrix:
    owner = matrix.shares or matrix.module
    codes, scales = (tensors[f"{owner}.{part}"].numpy() for part in ("codes", "scale"))
    return PackedMatrix(owner, codes, scales, storage_bits(matrix.bits), matrix.block, matrix.shape[1])
