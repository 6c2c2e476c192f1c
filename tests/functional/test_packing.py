"""Packing is the identity there and back, in the byte layout of MatMulNBits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.functional import packing

law = settings(max_examples=50, deadline=None, derandomize=True)


@law
@given(seed=st.integers(0, 2**31), bits=st.sampled_from([2, 4, 8]), rows=st.integers(0, 3), width=st.integers(0, 6))
def test_unpack_undoes_pack(seed: int, bits: int, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (2, rows, width * 8 // bits), generator=generator, dtype=torch.uint8)
    packed = packing.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, rows, width)
    assert torch.equal(packing.unpack(packed, bits), codes)


def test_the_first_code_takes_the_lowest_bits() -> None:
    assert packing.pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00_11_10_01]
    assert packing.pack(torch.tensor([0xA, 0x3], dtype=torch.uint8), 4).tolist() == [0x3A]
    assert packing.pack(torch.tensor([7, 200], dtype=torch.uint8), 8).tolist() == [7, 200]


@law
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 3),
    columns=st.integers(1, 70),
    block=st.sampled_from([16, 32]),
)
def test_signed_codes_survive_blocks(seed: int, bits: int, rows: int, columns: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (rows, columns), generator=generator, dtype=torch.int8)
    stored = packing.storage_bits(bits)
    packed = packing.pack_blocks(packing.to_unsigned(codes, bits), stored, block)
    assert packed.shape == (rows, -(-columns // block), block * stored // 8)
    back = packing.from_unsigned(packing.unpack_blocks(packed, stored, columns), bits)
    assert back.dtype == torch.int8 and torch.equal(back, codes)
    padding = packing.unpack(packed, stored).flatten(1)[:, columns:]
    assert (padding == packing.zero_point(bits)).all()


def test_storage_and_zero_points() -> None:
    assert [packing.storage_bits(b) for b in (2, 3, 4, 8)] == [2, 4, 4, 8]
    assert [packing.zero_point(b) for b in (2, 3, 4, 8)] == [2, 8, 8, 128]
    assert packing.to_unsigned(torch.tensor([-128, 0, 127], dtype=torch.int8), 8).tolist() == [0, 128, 255]


def test_what_does_not_fit_is_refused() -> None:
    codes = torch.zeros(2, 6, dtype=torch.uint8)
    for call, message in [
        (lambda: packing.storage_bits(5), "bits must be"),
        (lambda: packing.pack(codes, 3), "2, 4 or 8"),
        (lambda: packing.unpack(codes, 3), "2, 4 or 8"),
        (lambda: packing.pack(codes, 2), "whole bytes"),
        (lambda: packing.pack(codes + 16, 4), "lie in"),
        (lambda: packing.pack(codes.to(torch.int8), 4), "uint8"),
        (lambda: packing.unpack(codes.to(torch.int8), 4), "uint8"),
        (lambda: packing.pack_blocks(codes, 2, 6), "block"),
        (lambda: packing.unpack_blocks(torch.zeros(1, 2, 8, dtype=torch.uint8), 4, 33), "cannot hold"),
        (lambda: packing.unpack_blocks(torch.zeros(1, 2, 8, dtype=torch.uint8), 4, 16), "cannot hold"),
        (lambda: packing.to_unsigned(torch.tensor([2], dtype=torch.int8), 2), "lie in"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
