"""Laws: a block is quantized as if it were alone, short ones too, in value, codes, start and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.functional import fake_quant as fq
from compress.functional.blocks import by_block, codes_by_block, dequantize_blocks

law = settings(max_examples=8, deadline=None, derandomize=True)
BLOCK = 8
WIDTHS = (3, 8, 16, 21)  # less than a block, one, two, two and a short one


def quantizers(bits: int) -> dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]], str]]:
    """Value, codes and what else they take: ``scale``, ``curvature`` or nothing."""
    forms: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]], str]] = {
        "dynamic_scaling": (fq.dynamic_scaling, fq.dynamic_scaling_codes, "scale"),
        "pact": (fq.pact, fq.pact_codes, "scale"),
        "lsq": (fq.lsq, fq.lsq_codes, "scale"),
        "laq": (fq.laq, fq.laq_codes, "curvature"),
        "round_to_nearest": (fq.round_to_nearest, fq.round_to_nearest_codes, ""),
    }
    if bits == 2:
        forms["twn"] = (
            lambda weight, bits, dim=None: fq.twn(weight, dim=dim),
            lambda weight, bits, dim=None: fq.twn_codes(weight, dim=dim),
            "",
        )
    return forms


def operands(kind: str, width: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, width, generator=generator, dtype=torch.float64)
    weight[2] = 0
    if kind == "curvature":
        return [weight, torch.rand(weight.shape, generator=generator, dtype=torch.float64)]
    blocks = -(-width // BLOCK)
    scale = 0.2 + torch.rand(4, blocks, generator=generator, dtype=torch.float64)
    return [weight, scale] if kind == "scale" else [weight]


def alone(tensors: list[Tensor], row: int, block: int) -> list[Tensor]:
    """The operands of one block: its weights, and its scale or its part of the curvature."""
    span = slice(block * BLOCK, (block + 1) * BLOCK)
    return [each[row, span] if each.shape == tensors[0].shape else each[row, block] for each in tensors]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", WIDTHS)
@law
@given(seed=st.integers(0, 2**31))
def test_a_block_is_quantized_as_if_it_were_alone(bits: int, width: int, seed: int) -> None:
    for name, (value, codes_of, kind) in quantizers(bits).items():
        tensors = operands(kind, width, seed)
        leaves = [each.clone().requires_grad_(kind != "curvature" or not n) for n, each in enumerate(tensors)]
        whole = by_block(value, *leaves, block=BLOCK, bits=bits)
        upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        wanted = [each for each in leaves if each.requires_grad]
        gradients = torch.autograd.grad(whole, wanted, upstream)
        codes, scales = codes_by_block(codes_of, *tensors, block=BLOCK, bits=bits)
        assert codes.shape == whole.shape and codes.dtype == torch.int8, name
        assert scales.shape == (4, -(-width // BLOCK)), name
        assert torch.equal(dequantize_blocks(codes, scales, block=BLOCK), whole), name
        for row in range(4):
            for block in range(scales.shape[1]):
                span = slice(block * BLOCK, (block + 1) * BLOCK)
                part = [each.requires_grad_(leaf.requires_grad) for each, leaf in
                        zip(alone(tensors, row, block), leaves, strict=True)]  # fmt: skip
                single = value(*part, bits=bits)
                torch.testing.assert_close(whole[row, span], single, msg=name)
                expected = torch.autograd.grad(
                    single, [each for each in part if each.requires_grad], upstream[row, span]
                )
                for found, one in zip(gradients, expected, strict=True):
                    torch.testing.assert_close(found[row, span] if one.ndim else found[row, block], one, msg=name)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_search_of_a_clip_value_sees_its_own_block(width: int) -> None:
    (weight,) = operands("", width, 0)
    found = by_block(fq.search_gamma, weight, block=BLOCK, bits=3)
    assert found.shape == (4, -(-width // BLOCK))
    for row in range(4):
        for block in range(found.shape[1]):
            expected = fq.search_gamma(weight[row, block * BLOCK : (block + 1) * BLOCK], bits=3)
            torch.testing.assert_close(found[row, block], expected)


def test_no_padding_takes_part_in_a_short_block() -> None:
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0, 3.0]])
    _, scale = codes_by_block(fq.dynamic_scaling_codes, weight, torch.ones(1, 2), block=4, bits=2)
    assert scale.tolist() == [[1.0, 3.0]]  # mean |w|; three zeros beside the 3 would make it 0.75


@pytest.mark.parametrize("block", [0, -1])
def test_a_block_holds_something(block: int) -> None:
    with pytest.raises(ValueError, match=f"block must be at least 1, got {block}"):
        by_block(fq.round_to_nearest, torch.ones(2, 4), block=block, bits=2)


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones(2, 1), torch.ones(1, 2), torch.ones(2, 3)])
def test_scales_that_do_not_fit_are_refused(scale: Any) -> None:
    weight = torch.ones(2, 5)
    with pytest.raises(ValueError, match=r"blocks of 4 of a weight \(2, 5\) need scales of shape \(2, 2\)"):
        by_block(fq.lsq, weight, scale, block=4, bits=2)
    with pytest.raises(ValueError, match=r"need scales of shape \(2, 2\)"):
        dequantize_blocks(weight.to(torch.int8), scale, block=4)
