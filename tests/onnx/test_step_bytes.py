"""The bytes that a step of an exported Llama reads, counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from compress.onnx.step_bytes import directory_step_bytes

LAYERS, HIDDEN, VOCABULARY, FFN, SHARED = 2, 32, 67, 48, 16
"""Sizes of the tiny Llama; two key/value heads have 16 channels."""
HEAD_SIZE = 8


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("head_dim", [8, 16])
def test_a_step_reads_one_row_of_the_rotary_tables(exported: Callable[..., Any], tie: bool, head_dim: int) -> None:
    query, shared = 4 * head_dim, 2 * head_dim
    attention = HIDDEN * (query + 2 * shared) + query * HIDDEN
    matrices = LAYERS * (attention + 3 * HIDDEN * FFN) + VOCABULARY * HIDDEN
    norms = HIDDEN * (2 * LAYERS + 1)
    rows = HIDDEN + 2 * head_dim // 2  # a token, and a position's cosines and sines
    found = exported(family="llama", tie=tie, head_dim=head_dim)
    assert directory_step_bytes(found.directory) == 4 * (matrices + norms + rows)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 8])
def test_packed_products_count_as_they_are_stored(exported: Callable[..., Any], bits: int) -> None:
    attention = HIDDEN * (HIDDEN + 2 * SHARED) + HIDDEN**2
    padded = 2 * HIDDEN * FFN + HIDDEN * 64  # 48 inputs of the last product take two blocks of 32
    codes = (LAYERS * (attention + padded) + VOCABULARY * HIDDEN) * bits // 8
    scales = 4 * (7 * LAYERS + VOCABULARY)
    norms = 4 * HIDDEN * (2 * LAYERS + 1)
    rows = HIDDEN * bits // 8 + 4 + 4 * HEAD_SIZE  # codes and scale of a token, floats of a position
    found = exported(bits, family="llama", tie=True, quantization={"method": "round_to_nearest"})
    assert directory_step_bytes(found.directory) == codes + scales + norms + rows
