"""The tensors that a packed model may store in float16: scales of rows and groups, and position embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from compress.models.layout import is_embedding
from compress.surgery.quantization.spec import Float, MatrixSpec, QuantizationSpec, Storage

FLOAT32 = Storage()
"""Everything without codes is stored in float32."""
DTYPES: dict[Float, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}


def planned(model: nn.Module, matrices: Iterable[MatrixSpec], store: Storage) -> QuantizationSpec:
    """The storage plan of a stock or quantized model with these matrices, if float16 can hold every value.

    Embedding tables without codes are position embeddings.
    """
    stored = tuple(each.model_copy(update={"scales": store.of_scales(each.granularity)}) for each in matrices)
    quantized = {matrix.module for matrix in stored}
    tables = {
        f"{name}.weight": tuple(module.get_parameter("weight").shape)
        for name, module in model.named_modules()
        if is_embedding(module) and name not in quantized and store.positions == "float16"
    }
    return QuantizationSpec(matrices=stored, half=tables)


def in_half(state: Mapping[str, Tensor], spec: QuantizationSpec) -> tuple[dict[str, Tensor], QuantizationSpec]:
    """Round to float16 the tensors that ``spec`` stores in float16.

    A tensor stays float32, also in the returned spec, if float16 cannot hold it: scales need 11 bits of precision,
    positions only need to be in range.
    """
    scales = {f"{matrix.module}.scale" for matrix in spec.stored if matrix.scales == "float16"}
    held = {name for name in scales if _holds_scales(state[name])}
    tables = {name: shape for name, shape in spec.half.items() if _holds(state[name])}
    halved = {name: tensor.half() if name in held | set(tables) else tensor for name, tensor in state.items()}
    matrices = tuple(
        matrix if f"{matrix.shares or matrix.module}.scale" in held else matrix.model_copy(update={"scales": "float32"})
        for matrix in spec.matrices
    )
    return halved, QuantizationSpec(matrices=matrices, half=tables)


def left_in_float32(plan: QuantizationSpec, spec: QuantizationSpec) -> list[str]:
    """The tensors that :func:`planned` chose for float16 and that :func:`in_half` left in float32."""
    kept = {matrix.module for matrix in spec.matrices if matrix.scales == "float32"}
    scales = [f"{each.module}.scale" for each in plan.stored if each.scales == "float16" and each.module in kept]
    return scales + [name for name in plan.half if name not in spec.half]


def _holds(values: Tensor) -> bool:
    return bool((values.abs() <= torch.finfo(torch.float16).max).all())


def _holds_scales(scales: Tensor) -> bool:
    """Whether float16 holds every scale to 11 bits. A scale of zero, that of a block of zeros, is allowed."""
    return _holds(scales) and bool(((scales == 0) | (scales >= torch.finfo(torch.float16).tiny)).all())
