"""Decode one batch of responses to sources with the two sessions of an encoder-decoder model.

Shapes: B rows, R source tokens, S new tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from compress.onnx.runtime.opening import run
from compress.onnx.runtime.session import Array, bind_input, bind_output

_OWN = ".decoder."
"""Part of the names of the caches that grow with each token."""


class Seq2SeqDecoding:
    """The encoder's states of a batch, the tokens decoded so far, and the keys and values computed from both.

    ``capacity`` is the largest number of tokens in a response; None means as many as the graph has positions.
    """

    def __init__(
        self,
        encoder: ort.InferenceSession,
        decoder: ort.InferenceSession,
        input_ids: Array,
        attention_mask: Array | None = None,
        capacity: int | None = None,
    ) -> None:
        self._session, self._capacity = decoder, capacity
        self._mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        self._mask = np.ascontiguousarray(self._mask, np.int64)
        source = {"input_ids": np.ascontiguousarray(input_ids, np.int64), "attention_mask": self._mask}
        self._states: Array = encoder.run(None, source)[0]
        self._vocabulary: int = decoder.get_outputs()[0].shape[-1]
        pasts = [each for each in decoder.get_inputs() if each.name.startswith("past_key_values.")]
        self._presents = {each.name: each.name.replace("past_key_values", "present") for each in pasts}
        self._cache = {
            each.name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros((len(input_ids), each.shape[1], 0, each.shape[3]), np.float32)
            )
            for each in pasts
        }
        self._length = 0
        self._sources = np.arange(len(input_ids))

    def read(self, input_ids: Array) -> Array:
        """Append target tokens [B, S] and return the logits [B, V] of the next token."""
        return self.feed(input_ids)[:, -1]

    def feed(self, input_ids: Array) -> Array:
        """Append target tokens [B, S] and return their logits [B, S, V]."""
        total = self._length + input_ids.shape[1]
        if self._capacity is not None and total > self._capacity:
            raise ValueError(f"{total} tokens do not fit a capacity of {self._capacity}")
        if len(input_ids) > 1 and input_ids.shape[1] > 1 and self._length:
            # GroupQueryAttention takes several tokens on a past for one row only
            return np.concatenate([self.feed(column[:, None]) for column in input_ids.T], axis=1)
        binding = self._session.io_binding()
        arrays = {
            "input_ids": np.ascontiguousarray(input_ids, np.int64),
            "encoder_attention_mask": self._mask,
            "encoder_hidden_states": self._states,
        }
        for name, array in arrays.items():
            bind_input(binding, name, array)
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        # the keys and values of the source are computed in the first call
        renewed = [name for name in self._cache if _OWN in name or not self._length]
        for name in renewed:
            binding.bind_output(self._presents[name], "cpu")
        logits = np.empty((*input_ids.shape, self._vocabulary), np.float32)
        bind_output(binding, "logits", logits)
        run(self._session, binding, total)
        self._cache |= dict(zip(renewed, binding.get_outputs(), strict=False))
        self._length += input_ids.shape[1]
        return logits

    def reorder(self, rows: Array) -> None:
        """Keep these rows, in this order. A row may appear several times."""
        sources = self._sources[rows]
        moved = list(self._cache)
        if np.array_equal(sources, self._sources):  # as in beam search, where rows of one source are reordered
            moved = [name for name in moved if _OWN in name]
        else:
            self._mask, self._states, self._sources = self._mask[rows], self._states[rows], sources
        for name in moved:
            self._cache[name] = ort.OrtValue.ortvalue_from_numpy(self._cache[name].numpy()[rows])
