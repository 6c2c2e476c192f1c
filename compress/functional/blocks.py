"""Weight quantizers with one scale per row and block: rows of a weight [O, I] are split into blocks of inputs.

Every quantizer of `fake_quant` supports one scale per row (`dim=0`). Here each block is passed to it as a row. If I is
not a multiple of the block, the last block of each row is shorter: its means and sums cover its own weights only,
without padding. Scales have the shape [O, ceil(I / block)].
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, cat


def by_block(quantizer: Callable[..., Tensor], weight: Tensor, *state: Tensor, block: int, **options: Any) -> Tensor:
    """Apply `quantizer(weight, *state, dim=0)` to every block.

    Returns [O, I], or [O, ceil(I / block)] if the quantizer returns one number per row. Each tensor of `state` has the
    shape of the weight or of the scales. Raises ValueError for another shape, and for block < 1.
    """
    return _joined([quantizer(*part, **options | {"dim": 0}) for part in _parts((weight, *state), block)], len(weight))


def codes_by_block(
    quantizer: Callable[..., tuple[Tensor, Tensor]], weight: Tensor, *state: Tensor, block: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Quantize like `by_block`, but return int8 codes [O, I] and scales [O, ceil(I / block)]."""
    found = [quantizer(*part, **options | {"dim": 0}) for part in _parts((weight, *state), block)]
    codes, scales = zip(*found, strict=True)
    return _joined(codes, len(weight)), _joined(scales, len(weight))


def dequantize_blocks(codes: Tensor, scale: Tensor, *, block: int) -> Tensor:
    """Return codes [O, I] * scale [O, ceil(I / block)] in the dtype of the scale: the quantized weight, bit for bit."""
    _check(scale, codes.shape, block)
    return codes.to(scale.dtype) * scale.repeat_interleave(block, 1)[:, : codes.shape[1]]


def _parts(operands: Sequence[Tensor], block: int) -> Iterator[list[Tensor]]:
    """Return the full blocks, then the short last ones; each tensor is reshaped to [blocks, numbers per block]."""
    weight, *state = operands
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    for each in state:
        if each.shape != weight.shape:
            _check(each, weight.shape, block)
    whole, short = divmod(weight.shape[1], block)
    widths = [block if each.shape == weight.shape else 1 for each in operands]
    if whole:
        yield [each[:, : whole * width].reshape(-1, width) for each, width in zip(operands, widths, strict=True)]
    if short:
        yield [each[:, whole * width :].contiguous() for each, width in zip(operands, widths, strict=True)]


def _check(scale: Tensor, shape: Sequence[int], block: int) -> None:
    rows, columns = shape
    if tuple(scale.shape) != (rows, -(-columns // block)):
        raise ValueError(
            f"blocks of {block} of a weight ({rows}, {columns}) need scales of shape {(rows, -(-columns // block))}, "
            f"got {tuple(scale.shape)}"
        )


def _joined(parts: Sequence[Tensor], rows: int) -> Tensor:
    wide = [part.reshape(rows, -1) for part in parts]
    return wide[0] if len(wide) == 1 else cat(wide, 1)
