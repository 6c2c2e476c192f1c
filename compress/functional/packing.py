"""Convert integer codes to bytes and back, in the layout of ONNX Runtime's MatMulNBits: lowest bits first.

Codes are stored unsigned: the zero point is added to each signed code. It is 2^(b-1) for b stored bits: 2, 8, 128 for
2, 4, 8 bits. 3-bit codes are stored in 4 bits, so their zero point is 8 too.
Shapes: N rows (outputs of the linear layer), K codes per row (its inputs).
"""

import torch
from torch import Tensor


def storage_bits(bits: int) -> int:
    """Return the bits per stored code: 2, 4 (also for 3-bit codes) or 8. Raises ValueError for other `bits`."""
    stored = {2: 2, 3: 4, 4: 4, 8: 8}.get(bits)
    if stored is None:
        raise ValueError(f"bits must be 2, 3, 4 or 8, got {bits}")
    return stored


def zero_point(bits: int) -> int:
    """Return the unsigned code that represents 0: 2 for 2 bits, 8 for 3 and 4 bits, 128 for 8 bits."""
    return 1 << (storage_bits(bits) - 1)


def to_unsigned(codes: Tensor, bits: int) -> Tensor:
    """Add the zero point: signed int8 codes -> uint8 codes. Raises ValueError for codes out of range."""
    zero = zero_point(bits)
    wide = codes.to(torch.int16)  # 128 does not fit an int8 comparison
    if codes.numel() and not bool(((wide >= -zero) & (wide < zero)).all()):
        raise ValueError(f"signed codes of {bits} bits must lie in [{-zero}, {zero - 1}]")
    return (wide + zero).to(torch.uint8)


def from_unsigned(codes: Tensor, bits: int) -> Tensor:
    """Invert `to_unsigned`: uint8 -> int8."""
    return (codes.to(torch.int16) - zero_point(bits)).to(torch.int8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., K] into bytes [..., K * bits / 8], for 2, 4 or 8 bits.

    Raises ValueError if K codes do not fill whole bytes, if a code needs more bits, or if the dtype is not uint8.
    """
    per_byte = _codes_per_byte(bits)
    _check_uint8("codes", codes)
    if codes.shape[-1] % per_byte:
        raise ValueError(
            f"{codes.shape[-1]} codes of {bits} bits do not fill whole bytes; pad to a multiple of {per_byte}"
        )
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"unsigned codes of {bits} bits must lie in [0, {(1 << bits) - 1}], got {int(codes.max())}")
    grouped = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    return torch.sum(grouped << _shifts(codes, bits), -1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Invert `pack`: bytes [..., M] -> uint8 codes [..., M * 8 / bits]."""
    _codes_per_byte(bits)
    _check_uint8("packed", packed)
    return ((packed.unsqueeze(-1) >> _shifts(packed, bits)) & ((1 << bits) - 1)).flatten(-2)


def pack_blocks(codes: Tensor, bits: int, block: int) -> Tensor:
    """Pack uint8 codes [N, K] into bytes [N, ceil(K / block), block * bits / 8]: exactly the B input of MatMulNBits.

    The last block is padded with the zero point, which represents a weight of 0. Raises ValueError as `pack` does, and
    if a block does not fill whole bytes.
    """
    if block < 1 or block % _codes_per_byte(bits):
        raise ValueError(f"block {block} does not fill whole bytes with codes of {bits} bits")
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % block), value=zero_point(bits))
    return pack(padded.reshape(len(codes), padded.shape[-1] // block, block), bits)


def unpack_blocks(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Invert `pack_blocks`: bytes [N, blocks, bytes] -> uint8 codes [N, `columns`], padding dropped."""
    codes = unpack(packed, bits).flatten(-2)
    if not 0 <= codes.shape[-1] - columns < codes.shape[-1] // packed.shape[-2]:
        raise ValueError(f"{tuple(packed.shape)} bytes of {bits}-bit codes cannot hold rows of {columns} columns")
    return codes[..., :columns]


def _codes_per_byte(bits: int) -> int:
    if bits not in (2, 4, 8):
        raise ValueError(f"codes are packed with 2, 4 or 8 bits, got {bits}")
    return 8 // bits


def _check_uint8(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise ValueError(f"{name} must be uint8, got {tensor.dtype}")


def _shifts(like: Tensor, bits: int) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)
