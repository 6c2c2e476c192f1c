"""Check the tokens and masks of a caller and convert them for a graph. Shapes: B rows, T tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from compress.errors import UserError

Array = np.ndarray[Any, Any]


def prompts(input_ids: Any, attention_mask: Any, vocabulary: int) -> tuple[Array, Array | None]:
    """Return tokens [B, T] int64 and their mask, if any, from arrays or from lists of rows of equal length.

    A hidden position may hold any whole number; one outside the vocabulary is read as 0.

    Raises UserError for tokens without rows or columns, for a number that is not a token, and for a mask that does not
    fit the tokens.
    """
    ids = _array(input_ids, "input_ids")
    if ids.ndim != 2 or not ids.size:
        raise UserError(f"input_ids: the shape must be [rows, tokens] with at least one of each, got {ids.shape}")
    if ids.dtype.kind not in "iu":
        raise UserError(f"input_ids: {ids.dtype} is not an integer type; give token ids from 0 to {vocabulary - 1}")
    mask = None if attention_mask is None else _mask(attention_mask, ids)
    unknown = (ids < 0) | (ids >= vocabulary)
    wrong = ids[unknown if mask is None else unknown & (mask == 1)]
    if wrong.size:
        raise UserError(f"input_ids: {wrong[0]} is not a token of the vocabulary, 0 to {vocabulary - 1}")
    return np.where(unknown, 0, ids).astype(np.int64), mask


def _mask(attention_mask: Any, ids: Array) -> Array:
    mask = _array(attention_mask, "attention_mask")
    if mask.shape != ids.shape:
        raise UserError(f"attention_mask: the shape {mask.shape} differs from the shape {ids.shape} of input_ids")
    if mask.dtype.kind not in "biuf" or not ((mask == 0) | (mask == 1)).all():
        raise UserError("attention_mask: contains values other than 0 (padding) and 1")
    if not mask.any(axis=1).all():
        raise UserError(f"attention_mask: row {int(mask.any(axis=1).argmin())} masks all its tokens")
    return mask.astype(np.int64)


def _array(values: Any, name: str) -> Array:
    try:
        return np.asarray(values)
    except ValueError:  # numpy raises it for rows of unequal length
        raise UserError(
            f"{name}: the rows differ in length; pad them, and set attention_mask to 0 at the padding"
        ) from None
