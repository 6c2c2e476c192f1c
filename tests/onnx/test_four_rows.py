"""Four rows of unequal length at once: logits on an empty past and on later ones, and text, equal torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from compress.onnx.runtime import Runtime

LENGTHS = (9, 2, 7, 4)
STEPS = (3, 1, 1, 2)
"""Tokens that are fed one call after another; the first call of a response has an empty past too."""
SHAPES: list[dict[str, Any]] = [{"heads": 4, "hidden": 32}, {"heads": 3, "hidden": 36}]
WEIGHTS: list[dict[str, Any]] = [{"bits": 0}, {"bits": 4, "quantization": {"float_inputs": True}}]


@pytest.fixture(params=SHAPES, ids=["in place", "growing"])
def shape(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(params=WEIGHTS, ids=["float", "packed"])
def weights(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def rows(*, left: bool) -> tuple[Any, Any]:
    """Tokens and mask [4, 9]."""
    ids = np.random.default_rng(2).integers(3, 60, (4, 9))
    at, lengths = np.arange(9), np.array(LENGTHS)[:, None]
    mask = (at >= 9 - lengths) if left else (at < lengths)
    return np.where(mask, ids, 1), mask.astype(np.int64)


def loud(model: Any) -> Any:
    """Weights far from uniform predictions."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def pieces() -> list[Any]:
    return [np.random.default_rng(3 + i).integers(3, 60, (4, size)) for i, size in enumerate(STEPS)]


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.ptp(expected)))


def test_a_decoder(
    exported: Callable[..., Any], tiny_gpt2: Callable[..., Any], shape: dict[str, Any], weights: dict[str, Any]
) -> None:
    found = exported(model=loud(tiny_gpt2(**shape)), **weights)
    runtime = Runtime.open(found.directory, threads=1)
    ids, mask = rows(left=True)
    decoding, fed = runtime.start(4), [ids]
    logits = [decoding.feed(ids, mask).copy()]
    for piece in pieces():
        logits.append(decoding.feed(piece).copy())
        fed.append(piece)
    whole = np.concatenate(logits, axis=1)
    text = runtime.generate(ids, mask, max_new_tokens=8, eos_token_id=-1)
    for row, length in enumerate(LENGTHS):  # alone, and without padding
        alone = torch.from_numpy(np.concatenate([each[row] for each in fed])[9 - length :])[None]
        with torch.no_grad():
            close(whole[row, 9 - length :], found.model(alone).logits[0].numpy())
            said = found.model.generate(
                alone[:, :length], attention_mask=torch.ones(1, length, dtype=torch.int64), max_new_tokens=8,
                do_sample=False, eos_token_id=None, pad_token_id=1,
            )  # fmt: skip
        assert text[row, 9:].tolist() == said[0, length:].tolist()
    assert len({tuple(row) for row in text[:, 9:].tolist()}) > 1


@pytest.mark.slow
def test_an_encoder_and_its_decoder(
    exported: Callable[..., Any], tiny_bart: Callable[..., Any], shape: dict[str, Any], weights: dict[str, Any]
) -> None:
    found = exported(model=loud(tiny_bart(**shape)), **weights)
    runtime = Runtime.open(found.directory, threads=1)
    sources, mask = rows(left=False)
    answering = runtime.answer(sources, mask)
    whole = np.concatenate([answering.feed(piece).copy() for piece in pieces()], axis=1)
    targets = np.concatenate(pieces(), axis=1)
    free = {"eos_token_id": -1, "forced_eos_token_id": -1, "forced_bos_token_id": -1}
    text = runtime.generate(sources, mask, max_new_tokens=8, **free)
    for row, length in enumerate(LENGTHS):
        source = torch.from_numpy(sources[row : row + 1, :length])
        with torch.no_grad():
            expected = found.model(source, decoder_input_ids=torch.from_numpy(targets[row : row + 1])).logits[0]
            close(whole[row], expected.numpy())
            said = found.model.generate(
                source, attention_mask=torch.ones_like(source), max_new_tokens=8, do_sample=False, eos_token_id=None,
                pad_token_id=1, forced_eos_token_id=None, forced_bos_token_id=None,
            )  # fmt: skip
        assert text[row].tolist() == said[0].tolist()
    assert len({tuple(row) for row in text.tolist()}) > 1
