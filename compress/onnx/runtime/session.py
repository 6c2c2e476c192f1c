"""Decode one batch with an onnxruntime session: its cache, its mask and its tokens, one call at a time.

Shapes: B rows, S new tokens, T tokens so far, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from compress.onnx.names import IN_PLACE, LOGITS_FROM
from compress.onnx.runtime.opening import run

Array = np.ndarray[Any, Any]


class _Cache(Protocol):
    def bind(self, binding: ort.IOBinding, rows: slice) -> None: ...

    def keep(self, binding: ort.IOBinding) -> None: ...

    def reorder(self, rows: Array, length: int) -> None: ...


class _InPlaceCache:
    """One buffer per tensor, bound as both past and present: a step writes its own position and copies nothing.

    Rows copied from the same row share its positions. A position is copied again only if another row has written it
    since. ``_writers`` [B, capacity] holds, for each position, the row that wrote it, numbered as at that time.
    """

    def __init__(self, session: ort.InferenceSession, batch: int, capacity: int) -> None:
        self._buffers = [
            (past.name, present.name, np.zeros((batch, past.shape[1], capacity, past.shape[3]), np.float32))
            for past, present in _cache_tensors(session)
        ]
        self._writers = np.zeros((batch, capacity), np.int32)
        self._reordered_at = 0

    def bind(self, binding: ort.IOBinding, rows: slice) -> None:
        for past, present, buffer in self._buffers:
            bind_input(binding, past, buffer[rows])
            bind_output(binding, present, buffer[rows])

    def keep(self, binding: ort.IOBinding) -> None:
        """Do nothing: the buffers already hold the new keys and values."""

    def reorder(self, rows: Array, length: int) -> None:
        self._writers[:, self._reordered_at : length] = np.arange(len(self._writers))[:, None]
        before, self._writers, self._reordered_at = self._writers, self._writers[rows], length
        if len(rows) > len(before):
            self._buffers = [(past, present, _spread(buffer, rows, length)) for past, present, buffer in self._buffers]
            return
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        differs = (self._writers[moved, :length] != before[moved, :length]).any(0)
        start = int(differs.argmax()) if differs.any() else length
        for _, _, buffer in self._buffers:
            buffer[moved, :, start:length] = buffer[rows[moved], :, start:length]
        self._buffers = [(past, present, buffer[: len(rows)]) for past, present, buffer in self._buffers]


class _GrowingCache:
    """The present of one call is the past of the next."""

    def __init__(self, session: ort.InferenceSession, batch: int) -> None:
        pairs = _cache_tensors(session)
        self._names = [(past.name, present.name) for past, present in pairs]
        empty = [np.zeros((batch, past.shape[1], 0, past.shape[3]), np.float32) for past, _ in pairs]
        self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in empty]

    def bind(self, binding: ort.IOBinding, rows: slice) -> None:
        for (past, present), value in zip(self._names, self._values, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present, "cpu")

    def keep(self, binding: ort.IOBinding) -> None:
        self._values = binding.get_outputs()[
            : len(self._names)
        ]  # in the order in which they were first bound, logits last

    def reorder(self, rows: Array, length: int) -> None:
        self._values = [ort.OrtValue.ortvalue_from_numpy(value.numpy()[rows]) for value in self._values]


class Decoding:
    """The tokens of a batch with their keys and values; ``capacity`` is the largest number of tokens in a row."""

    def __init__(self, session: ort.InferenceSession, batch: int, capacity: int) -> None:
        self._session = session
        self._in_place = session.get_modelmeta().graph_name == IN_PLACE
        self._cache: _Cache = (
            _InPlaceCache(session, batch, capacity) if self._in_place else _GrowingCache(session, batch)
        )
        self._mask = np.zeros((batch, capacity), np.int64)
        self._length = 0
        self._vocabulary: int = session.get_outputs()[0].shape[-1]
        self._logits = np.empty((batch, 0, 0), np.float32)
        self._binding = session.io_binding()
        self._cache.bind(self._binding, slice(None))
        self._offers_last = LOGITS_FROM in [option.name for option in session.get_overridable_initializers()]

    def read(self, input_ids: Array, attention_mask: Array | None = None) -> Array:
        """Append a prompt [B, S] (mask 0: padding) and return the logits [B, V] of the next token.

        If the graph has the option, only the last position goes through the head.
        """
        return self._append(input_ids, attention_mask, first=-1 if self._offers_last else 0)[:, -1]

    def feed(self, input_ids: Array, attention_mask: Array | None = None) -> Array:
        """Append tokens [B, S] (mask 0: padding) and return their logits [B, S, V].

        This object owns the array: the next call may overwrite it. The caller may also overwrite it.
        """
        return self._append(input_ids, attention_mask)

    def _append(self, input_ids: Array, attention_mask: Array | None, first: int = 0) -> Array:
        batch, new = input_ids.shape
        past, total = self._length, self._length + new
        if total > self._mask.shape[1]:
            raise ValueError(f"{total} tokens do not fit a capacity of {self._mask.shape[1]}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape {input_ids.shape} of input_ids, got {attention_mask.shape}"
            )
        self._mask[:, past:total] = 1 if attention_mask is None else attention_mask
        positions = (self._mask[:, :total].cumsum(-1) - 1).clip(min=0)[:, past:]
        self._logits = _array_of_shape(self._logits, (batch, 1 if first else new, self._vocabulary))
        self._length = total
        if self._in_place and batch > 1 and new > 1 and past > 0:  # GroupQueryAttention takes one row at a time here
            for row in range(batch):
                rows, binding = slice(row, row + 1), self._session.io_binding()
                self._cache.bind(binding, rows)
                self._run(binding, rows, input_ids, positions, first)
        else:
            self._run(self._binding, slice(None), input_ids, positions, first)
        return self._logits

    def reorder(self, rows: Array) -> None:
        """Keep these rows, in this order. A row may appear several times, or not at all."""
        if np.array_equal(rows, np.arange(len(self._mask))):
            return
        self._cache.reorder(rows, self._length)
        self._cache.bind(self._binding, slice(None))
        self._mask = self._mask[rows]

    def _run(self, binding: ort.IOBinding, rows: slice, input_ids: Array, positions: Array, first: int) -> None:
        tokens = {"input_ids": input_ids, "attention_mask": self._mask[:, : self._length], "position_ids": positions}
        arrays = {name: np.ascontiguousarray(value[rows], np.int64) for name, value in tokens.items()}
        if self._offers_last:
            arrays[LOGITS_FROM] = np.array([first])
        for name, array in arrays.items():
            bind_input(binding, name, array)
        bind_output(binding, "logits", self._logits[rows])
        run(self._session, binding, self._length)
        self._cache.keep(binding)
        if not self._in_place:
            self._cache.bind(binding, rows)


def bind_input(binding: ort.IOBinding, name: str, array: Array) -> None:
    """Let a graph read an array without a copy."""
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def bind_output(binding: ort.IOBinding, name: str, array: Array) -> None:
    """Let a graph write into an array without a copy."""
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _cache_tensors(session: ort.InferenceSession) -> list[tuple[ort.NodeArg, ort.NodeArg]]:
    pasts = [tensor for tensor in session.get_inputs() if tensor.name.startswith("past_key_values.")]
    presents = [tensor for tensor in session.get_outputs() if tensor.name.startswith("present.")]
    return list(zip(pasts, presents, strict=True))


def _spread(buffer: Array, rows: Array, length: int) -> Array:
    """Return a new buffer with more rows, filled up to this length."""
    found = np.zeros((len(rows), *buffer.shape[1:]), buffer.dtype)
    found[:, :, :length] = buffer[rows, :, :length]
    return found


def _array_of_shape(array: Array, shape: tuple[int, ...]) -> Array:
    return array if array.shape == shape else np.empty(shape, array.dtype)
