"""Replace the linear layers, token embeddings and head of a model by fake-quantized ones, in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from compress.errors import ModelError
from compress.models.family import ModelFamily
from compress.models.layout import is_embedding, is_product, weight_of
from compress.models.structure import stock_tensors
from compress.surgery.coverage import Coverage, owners
from compress.surgery.quantization.modules import FakeQuantWeight, Product, StoredWeight, Table
from compress.surgery.quantization.spec import (
    ActivationName,
    MatrixSpec,
    Quantization,
    QuantizationSpec,
    Storage,
    block_size,
    packed_bytes,
)

Filter = Callable[[str, nn.Module], bool]
"""Chooses modules to quantize by their dotted name and the module itself."""


def plan(model: nn.Module, family: ModelFamily, config: Quantization, select: Filter | None = None) -> QuantizationSpec:
    """Plan what ``quantize`` will do to a model. Only shapes are read, so a model on the meta device is enough.

    Token embeddings and the head get the bits of ``embedding``. Every other linear layer that the family's tables name
    gets the bits of ``weights``. Modules that hold the same parameter share one set of codes. Modules for which
    ``select`` is false are left out.

    Raises ModelError if ``select`` takes only one of two modules that share a weight.
    """
    owners: dict[int, str] = {}
    matrices = []
    for name in _selected(model, _targets(model, family), select):
        weight = model.get_submodule(name).get_parameter("weight")
        owner = owners.setdefault(id(weight), name)
        rows, columns = weight_of(model.get_submodule(name)).shape
        chosen = config.embedding if name in (*family.embeddings, family.head) else config.weights
        matrices.append(
            MatrixSpec(
                module=name,
                shape=(rows, columns),
                bits=chosen.bits,
                granularity=chosen.granularity,
                block=block_size(columns, chosen.group_size),
                method=config.weights.method,
                activations=_activations(model, family, name, config),
                clip=config.activations.clip if config.activations else None,
                shares="" if owner == name else owner,
            )
        )
    return storage_plan(model, matrices, config.store)


def storage_plan(model: nn.Module, matrices: Iterable[MatrixSpec], store: Storage) -> QuantizationSpec:
    """Return the storage plan of a plain or quantized model with these matrices, if float16 can hold every value.

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


def quantize(
    model: nn.Module, family: ModelFamily, config: Quantization, spec: QuantizationSpec | None = None
) -> Coverage:
    """Fake-quantize a transformers model in place. Its float weights become the trainable master weights.

    Position embeddings, normalizations, biases and buffers are not quantized. ``spec`` is the result of :func:`plan`
    for this model, if there is one. Raises NothingDoneError if there is nothing to quantize.
    """
    spec = plan(model, family, config) if spec is None else spec
    coverage = _coverage(model, spec)
    coverage.require("quantize")
    search, norm_gradient = config.weights.init == "search", config.weights.norm_gradient
    weights: dict[str, FakeQuantWeight] = {}
    for matrix in spec.matrices:
        if not matrix.shares:
            stock = weight_of(model.get_submodule(matrix.module))
            weights[matrix.module] = FakeQuantWeight(
                stock, matrix, search=search, noise_p=config.noise_p, norm_gradient=norm_gradient
            )
        swap(model, family, matrix, weights[matrix.shares or matrix.module])
    return coverage


def swap(model: nn.Module, family: ModelFamily, matrix: MatrixSpec, weight: FakeQuantWeight | StoredWeight) -> None:
    """Replace one transformers module by one that computes with ``weight``. The bias stays the same parameter."""
    stock = model.get_submodule(matrix.module)
    weight.train(stock.training)
    new: Product | Table
    if is_embedding(stock):
        scale = family.embedding_scale(model.config, matrix.shape[1])
        new = Table(weight, getattr(stock, "padding_idx", None), scale, matrix)
    else:
        new = Product(weight, stock.bias, matrix)  # type: ignore[arg-type]
    model.set_submodule(matrix.module, new.train(stock.training))


def _targets(model: nn.Module, family: ModelFamily) -> Iterator[str]:
    named = {slot.module for axis in family.axes(model.config) for slot in axis.slots}
    products = {name for name, module in model.named_modules() if name in named and is_product(module)}
    yield from family.embeddings
    yield from (name for name, _ in model.named_modules() if name in products and name != family.head)
    yield family.head


def _selected(model: nn.Module, names: Iterable[str], select: Filter | None) -> list[str]:
    names = list(names)
    chosen = [name for name in names if select is None or select(name, model.get_submodule(name))]
    weights = {name: id(model.get_submodule(name).get_parameter("weight")) for name in names}
    for name in chosen:
        if apart := [other for other in names if weights[other] == weights[name] and other not in chosen]:
            raise ModelError(
                f"filter: includes {name} but not {apart[0]}, which shares its weight; include both or neither"
            )
    return chosen


def _activations(model: nn.Module, family: ModelFamily, name: str, config: Quantization) -> ActivationName:
    chosen = config.activations
    if chosen is None or is_embedding(model.get_submodule(name)):
        return "none"
    if chosen.granularity == "block":
        return "block"
    if chosen.symmetric is not None:
        return "symmetric" if chosen.symmetric else "asymmetric"
    downs = {f".{stack.feed_forward.down}" for stack in family.stacks if not stack.feed_forward.gate}
    return "asymmetric" if name.endswith(tuple(downs)) else "symmetric"  # gated values are often negative too


def _coverage(model: nn.Module, spec: QuantizationSpec) -> Coverage:
    elements = sum(tensor.numel() for tensor in stock_tensors(model))
    return Coverage(
        modules_touched=len(spec.matrices),
        modules_total=len(owners(model)),
        parameters_touched=sum(math.prod(matrix.shape) for matrix in spec.stored),
        parameters_total=sum(parameter.numel() for parameter in model.parameters()),
        bytes_before=4 * elements,
        bytes_after=packed_bytes(spec, elements),
        note=spec.note,
    )
