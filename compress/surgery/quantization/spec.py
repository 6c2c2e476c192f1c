"""Quantization as data: the settings of a recipe, and the resolved record of every matrix of an artifact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from compress.functional.packing import storage_bits
from compress.registry import QUANTIZERS
from compress.schema import Strict, added

Bits = Literal[2, 3, 4, 8]
Granularity = Literal["tensor", "row", "group"]
GroupSize = Literal[32, 64, 128]
MethodName = Annotated[str, AfterValidator(QUANTIZERS.known)]
Float = Literal["float32", "float16"]
ActivationName = Literal["none", "block", "symmetric", "asymmetric"]
Activations = Literal["none", "block", "tensor"]
"""How the inputs of linear layers are quantized: not at all, with a scale per row and block, or per tensor."""

BLOCKS = (128, 64, 32)
"""Block sizes with fast deployed kernels, in order of preference."""


def _implied_granularity(value: Any) -> Any:
    """Set granularity to ``group`` if a group size is given. ValueError if another granularity is given too."""
    if not isinstance(value, Mapping) or value.get("group_size") is None:
        return value
    granularity = value.get("granularity", "group")
    if granularity != "group":
        raise ValueError(f"group_size needs granularity: group, and granularity is {granularity}; leave one out")
    return {**value, "granularity": "group"}


class WeightQuantization(Strict):
    """Bits and method of the linear layers.

    One scale per matrix, per ``row`` (an output), or per ``group``: ``group_size`` neighbouring inputs of a row.
    ``init: search`` starts each learned scale where the squared error is least, ``one`` at the method's own first value
    (for dynamic scaling gamma = 1, the paper's).
    """

    bits: Bits
    granularity: Granularity = "tensor"
    group_size: GroupSize | None = added(None)
    """Inputs that share a scale; implies ``granularity: group``. Without it, groups have the largest of 128, 64 and 32
    that divides the inputs, else 32 with padding."""
    method: MethodName = "dynamic_scaling"
    """``dynamic_scaling``, ``pact``, ``lsq``, ``laq``, ``twn``, ``round_to_nearest``, or a plug-in."""
    init: Literal["search", "one"] = "search"
    norm_gradient: bool = added(False)
    """Dynamic scaling only: the mean |w| of its clip value carries gradient to the weights; off, it is a constant."""

    @model_validator(mode="before")
    @classmethod
    def _grouped(cls, value: Any) -> Any:
        return _implied_granularity(value)

    @model_validator(mode="after")
    def _norm_where_it_counts(self) -> WeightQuantization:
        if self.norm_gradient and self.method != "dynamic_scaling":
            raise ValueError(
                f"norm_gradient needs method: dynamic_scaling; {self.method} does not learn through a norm"
            )
        return self


class EmbeddingQuantization(Strict):
    """Bits of the token embedding and of the head, by default with one scale per token.

    The method is that of the weights.
    """

    bits: Bits
    granularity: Granularity = "row"
    group_size: GroupSize | None = added(None)
    """Channels that share a scale; implies ``granularity: group``."""

    @model_validator(mode="before")
    @classmethod
    def _grouped(cls, value: Any) -> Any:
        return _implied_granularity(value)


class ActivationQuantization(Strict):
    """Dynamic 8-bit quantization of the input of every quantized linear layer, the head included.

    ``block`` is what the deployed kernel computes: symmetric, with one scale per row and block. ``tensor`` has one
    scale per tensor, as in the papers; no deployed kernel computes it.
    """

    renamed: ClassVar[Mapping[str, str]] = {
        "scheme": "granularity",
        "scheme: paper": "granularity: tensor",
    }

    bits: Literal[8] = 8
    granularity: Literal["block", "tensor"] = "block"
    symmetric: bool | None = added(None)
    """Whether codes are symmetric around zero. By default all are with ``block``, and with ``tensor`` all but the
    inputs that come from an activation function without a gate (QuantGPT)."""
    clip: float | None = Field(None, gt=0)
    """With ``tensor``, inputs are first clipped to [-clip, clip]."""

    @model_validator(mode="after")
    def _as_the_kernel(self) -> ActivationQuantization:
        if self.granularity == "tensor":
            return self
        if self.clip is not None:
            raise ValueError("clip needs granularity: tensor; the deployed kernel of granularity: block does not clip")
        if self.symmetric is False:
            raise ValueError(
                "symmetric: false needs granularity: tensor; the deployed kernel of granularity: block is symmetric"
            )
        return self


class Storage(Strict):
    """The type of tensors without codes in packed directories and graphs. Values are rounded to it when packed.

    ``scales`` are the scales of rows and groups. The scale of a whole matrix stays float32. So do the scales of a
    matrix if float16 represents one of them with fewer than 11 bits (below 6.1e-5) or not at all (above 65504).
    ``positions`` are the position embeddings.
    """

    scales: Float = "float32"
    positions: Float = "float32"

    def of_scales(self, granularity: Granularity) -> Float:
        """Return the dtype of the scales of a matrix with this granularity."""
        return "float32" if granularity == "tensor" else self.scales


class Quantization(Strict):
    """All settings of ``quantize``. ``noise_p`` is the share of weights that a training step quantizes."""

    weights: WeightQuantization
    embedding: EmbeddingQuantization
    activations: ActivationQuantization | None = ActivationQuantization()
    noise_p: float = Field(1.0, ge=0, le=1)
    store: Storage = Storage()

    @model_validator(mode="after")
    def _ternary(self) -> Quantization:
        if self.weights.method == "twn" and (self.weights.bits, self.embedding.bits) != (2, 2):
            raise ValueError("method twn is ternary; it needs bits: 2 for weights and embedding")
        return self


class MatrixSpec(Strict):
    """One quantized module: its weight [out, in] and the quantization of its input."""

    module: str
    shape: tuple[int, int]
    bits: Bits
    granularity: Granularity
    block: int
    """The number of neighbouring inputs that share an activation scale. Rows are packed in units of this size."""
    method: MethodName
    activations: ActivationName
    clip: float | None = None
    shares: str = ""
    """The module whose codes and scales this one uses (tied weights). Empty if it has its own."""
    scales: Float = added("float32")
    """The dtype in which the scales are stored."""

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        """Shape of the packed codes in bytes: [out, blocks of the input, bytes of a block]."""
        rows, columns = self.shape
        return rows, math.ceil(columns / self.block), self.block * storage_bits(self.bits) // 8

    @property
    def dim(self) -> int | None:
        """The dimension with separate scales per index. None for one scale per matrix."""
        return None if self.granularity == "tensor" else 0

    @property
    def group(self) -> int | None:
        """The number of neighbouring inputs of a row that share a scale. None if scales do not depend on the input."""
        return self.block if self.granularity == "group" else None

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales: [] for one, [out], or [out, blocks of the input]."""
        shapes = {"tensor": (), "row": self.shape[:1], "group": self.packed_shape[:2]}
        return shapes[self.granularity]


class QuantizationSpec(Strict):
    """Every quantized module of a model: linear layers, token embeddings and the head."""

    matrices: tuple[MatrixSpec, ...]
    half: dict[str, tuple[int, ...]] = added({})
    """The tensors without codes that are stored as float16, with their shapes."""

    @property
    def stored(self) -> list[MatrixSpec]:
        """The matrices that have their own codes."""
        return [matrix for matrix in self.matrices if not matrix.shares]

    @property
    def activations(self) -> Activations:
        """How the inputs of linear layers are quantized."""
        found = {matrix.activations for matrix in self.matrices} - {"none"}
        if not found:
            return "none"
        return "block" if found == {"block"} else "tensor"

    @property
    def note(self) -> str:
        """A remark that sizes alone do not show. Empty if there is none."""
        return "3-bit codes take 4 bits" if any(matrix.bits == 3 for matrix in self.stored) else ""


def block_size(columns: int, group_size: int | None = None) -> int:
    """Return the block size along the inputs of a linear layer: ``group_size`` if given (padded if it does not divide).

    Without ``group_size``: the largest of 128, 64 and 32 that divides the inputs, or 32 with padding if none does.
    """
    if group_size is not None:
        return group_size
    return next((block for block in BLOCKS if columns % block == 0), BLOCKS[-1])


def packed_bytes(spec: QuantizationSpec, elements: int, *, scales: bool = True) -> int:
    """Count the bytes of a packed model with ``elements`` values. Unquantized tensors are float32 or float16.

    ``scales=False`` leaves the scales out, as the papers do.
    """
    codes = sum(math.prod(matrix.packed_shape) for matrix in spec.stored)
    floats = 4 * (elements - sum(math.prod(matrix.shape) for matrix in spec.stored))
    halved = 2 * sum(math.prod(shape) for shape in spec.half.values())
    sizes = {"float32": 4, "float16": 2}
    scaling = sum(math.prod(matrix.scale_shape) * sizes[matrix.scales] for matrix in spec.stored)
    return codes + floats - halved + scales * scaling
