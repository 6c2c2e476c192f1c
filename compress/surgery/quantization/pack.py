"""Pack a quantized model into tensors, some of them in float16, and restore a working model from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.functional.blocks import dequantize_blocks
from compress.functional.fake_quant import dequantize as dequantized
from compress.functional.packing import from_unsigned, pack_blocks, storage_bits, to_unsigned, unpack_blocks
from compress.models.family import ModelFamily
from compress.models.layout import weight_of
from compress.surgery.quantization.convert import storage_plan, swap
from compress.surgery.quantization.modules import FakeQuantWeight, Product, StoredWeight, Table
from compress.surgery.quantization.spec import Float, MatrixSpec, QuantizationSpec, Storage

FLOAT32 = Storage()
"""Everything without codes is stored in float32."""
DTYPES: dict[Float, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}

RESTORED = "compress_restored"
"""Attribute of a model that was restored from packed tensors: the spec that described them."""


def packed_state(
    model: nn.Module, plan: QuantizationSpec | Storage | None = None
) -> tuple[dict[str, Tensor], QuantizationSpec]:
    """Return the tensors to store for a quantized model, and the spec that describes them.

    Each matrix with its own codes has ``MODULE.codes``, uint8 [out, blocks, bytes] in the layout of ``pack_blocks``,
    and ``MODULE.scale``, [], [out] or [out, blocks]. Every other tensor of the model keeps its name. Scales and
    other tensors are float32, except those that ``plan`` asks for in float16 (see :func:`in_half`). They are rounded
    here and not during training, so that a restored model and a graph compute with the same numbers.

    ``plan`` is the spec that the model was quantized with, or only says which tensors are stored in float16. Without
    one, a restored model is stored as it was, and any other in float32.

    Raises ModelError for a weight that no longer is what the codes of a restored model say.
    """
    modules = [module for module in model.modules() if isinstance(module, Product | Table)]
    if plan is None:
        plan = getattr(model, RESTORED, FLOAT32)
    if isinstance(plan, Storage):
        spec = storage_plan(model, [module.spec for module in modules], plan)
    else:  # in the order of the model's modules
        by_name = {matrix.module: matrix for matrix in plan.matrices}
        spec = plan.model_copy(update={"matrices": tuple(by_name[module.spec.module] for module in modules)})
    state: dict[str, Tensor] = {}
    masters: set[int] = set()
    for module in modules:
        masters |= {id(tensor) for tensor in module.quantizer.state_dict(keep_vars=True).values()}
        if not module.spec.shares:
            codes, scale = _packed(module.quantizer, module.spec)
            state[f"{module.spec.module}.codes"] = codes.cpu().contiguous()
            state[f"{module.spec.module}.scale"] = scale.float().cpu().contiguous()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in masters:
            masters.add(id(tensor))  # a tensor that several modules share is stored once, under its first name
            state[name] = tensor.detach().cpu().contiguous()
    return in_half(state, spec)


def _packed(weight: FakeQuantWeight | StoredWeight, matrix: MatrixSpec) -> tuple[Tensor, Tensor]:
    """Return the packed codes, uint8 [out, blocks, bytes], and scales of a weight."""
    if isinstance(weight, FakeQuantWeight):
        codes, scale = weight.codes()
        return pack_blocks(to_unsigned(codes, matrix.bits), storage_bits(matrix.bits), matrix.block), scale
    held = {f"{matrix.module}.codes": weight.codes, f"{matrix.module}.scale": weight.scale}
    if not torch.equal(_dequantized(matrix, held), weight.weight.cpu()):
        raise ModelError(
            f"{matrix.module}: its weight was changed after it was read from packed codes, which cannot follow; "
            "load the directory again"
        )
    return weight.codes, weight.scale


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
    """Return the tensors that :func:`storage_plan` chose for float16 and that :func:`in_half` left in float32."""
    kept = {matrix.module for matrix in spec.matrices if matrix.scales == "float32"}
    scales = [f"{each.module}.scale" for each in plan.stored if each.scales == "float16" and each.module in kept]
    return scales + [name for name in plan.half if name not in spec.half]


def unpacked(matrix: MatrixSpec, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the codes, int8 [out, in], and scales, float32, of a matrix; shared ones from the module that owns them.

    Raises ModelError for a tensor that is missing, or whose shape or type differs from the matrix's spec.
    """
    owner = matrix.shares or matrix.module
    packed = _tensor(tensors, f"{owner}.codes", matrix.packed_shape, torch.uint8)
    scale = _tensor(tensors, f"{owner}.scale", matrix.scale_shape, DTYPES[matrix.scales])
    codes = unpack_blocks(packed, storage_bits(matrix.bits), matrix.shape[1])
    return from_unsigned(codes, matrix.bits), scale.float()


def restore(
    model: nn.Module, family: ModelFamily, spec: QuantizationSpec, tensors: Mapping[str, Tensor], *, dequantize: bool
) -> None:
    """Fill a transformers model from packed tensors, in place.

    The result computes like the deployed model: weights are codes * scale, and inputs of linear layers are quantized.
    It matches the float32 forward pass of the fake-quantized model bit for bit. With ``dequantize``, it remains a plain
    model that holds those weights.

    Raises ModelError, naming the tensor, if tensors and model do not fit.
    """
    _fill_floats(model, spec, tensors)
    weights = {matrix.module: _dequantized(matrix, tensors) for matrix in spec.stored}
    stored = {} if dequantize else {name: _stored(name, weight, tensors) for name, weight in weights.items()}
    for matrix in spec.matrices:
        owner = matrix.shares or matrix.module
        if dequantize:
            with torch.no_grad():
                weight_of(model.get_submodule(matrix.module)).copy_(weights[owner])
        else:
            swap(model, family, matrix, stored[owner])
    if not dequantize:
        setattr(model, RESTORED, spec)


def _stored(module: str, weight: Tensor, tensors: Mapping[str, Tensor]) -> StoredWeight:
    return StoredWeight(weight, tensors[f"{module}.codes"], tensors[f"{module}.scale"])


def _dequantized(matrix: MatrixSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    codes, scale = unpacked(matrix, tensors)
    if matrix.group is not None:
        return dequantize_blocks(codes, scale, block=matrix.group)
    return dequantized(codes, scale, dim=matrix.dim)


def _fill_floats(model: nn.Module, spec: QuantizationSpec, tensors: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    for matrix in spec.matrices:
        if f"{matrix.module}.weight" not in state:
            raise ModelError(f"quantization names {matrix.module!r}, which this model does not have")
        shape = weight_of(model.get_submodule(matrix.module)).shape
        if tuple(shape) != matrix.shape:
            raise ModelError(
                f"{matrix.module}: quantization has the shape {matrix.shape}, but the model has {tuple(shape)}"
            )
    codes = {f"{matrix.module}.{part}" for matrix in spec.stored for part in ("codes", "scale")}
    floats = set(state) - {f"{matrix.module}.weight" for matrix in spec.matrices}
    if unknown := set(tensors) - codes - floats:
        raise ModelError(f"quantized tensors contain {min(unknown)!r}, which this model does not have")
    dtypes = {name: torch.float16 if name in spec.half else state[name].dtype for name in floats}
    shared = model.state_dict(keep_vars=True)
    stored = {id(shared[name]) for name in floats & set(tensors)}
    expected = {name for name in floats if name in tensors or id(shared[name]) not in stored}
    filled = {name: _tensor(tensors, name, tuple(state[name].shape), dtypes[name]) for name in sorted(expected)}
    model.load_state_dict(filled, strict=False)


def _tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if name not in tensors:
        raise ModelError(f"quantized tensors lack {name!r}")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ModelError(f"{name}: expected {dtype} {shape}, found {tensor.dtype} {tuple(tensor.shape)}")
    return tensor


def _holds(values: Tensor) -> bool:
    return bool((values.abs() <= torch.finfo(torch.float16).max).all())


def _holds_scales(scales: Tensor) -> bool:
    """Return whether float16 holds every scale to 11 bits. A scale of zero, that of a block of zeros, is allowed."""
    return _holds(scales) and bool(((scales == 0) | (scales >= torch.finfo(torch.float16).tiny)).all())
