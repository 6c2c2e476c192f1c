"""Text generation from an exported directory. A deployed process needs numpy and onnxruntime for it, nothing else.

    runtime = Runtime.open("model-onnx", threads=2)
    tokens = runtime.generate(np.array([[464, 3290]]), max_new_tokens=16, num_beams=4)

Shapes: B rows, T tokens, V tokens of the vocabulary. Prompts of unequal length are padded on the left, with 0 there in
``attention_mask``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from compress.errors import ModelError, UserError
from compress.onnx.beams import beam_search
from compress.onnx.names import MODEL_FILE
from compress.onnx.rules import Rules
from compress.onnx.sampling import Options, as_tokens, choose
from compress.onnx.session import Array, Decoding

_LOAD_ERRORS = (ort_errors.Fail, ort_errors.InvalidProtobuf, ort_errors.InvalidGraph, ort_errors.NoSuchFile)


class Runtime:
    """A causal model opened for decoding."""

    def __init__(self, session: ort.InferenceSession, settings: dict[str, Any]) -> None:
        self._session = session
        self._context: int = settings["context"]
        self._ends = as_tokens(settings.get("eos_token_id"))
        self._pad: int | None = settings.get("pad_token_id")

    @classmethod
    def open(cls, directory: str | Path, threads: int | None = None) -> Runtime:
        """Open an exported directory; ``threads`` None lets onnxruntime take every core."""
        path = Path(directory)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        try:
            session = ort.InferenceSession(path / MODEL_FILE, options, providers=["CPUExecutionProvider"])
        except _LOAD_ERRORS as error:
            raise ModelError(f"{path / MODEL_FILE}: cannot be opened ({str(error).splitlines()[0]})") from None
        return cls(session, decoding_settings(path))

    @property
    def context(self) -> int:
        """The most tokens a row may have, prompt and generated."""
        return self._context

    def logits(self, input_ids: Array, attention_mask: Array | None = None) -> Array:
        """Logits of whole sequences, [B, T] -> [B, T, V]."""
        self._check_length(input_ids.shape[1], 0)
        return Decoding(self._session, *input_ids.shape).feed(input_ids, attention_mask)

    def start(self, batch: int, capacity: int | None = None) -> Decoding:
        """Begin to decode a batch by hand: ``feed`` takes a prompt, then one token at a time, or several."""
        return Decoding(self._session, batch, self._context if capacity is None else capacity)

    def generate(self, input_ids: Array, attention_mask: Array | None = None, **options: Any) -> Array:
        """Continue prompts: [B, T] -> [B, T + new] int64; ``options`` are those of :class:`Options`.

        Stops when every row has ended; a row that ended earlier is filled with padding. Raises UserError for an option
        that is out of range, and for a prompt that is empty, ends in padding, or leaves too little of the context.
        """
        chosen, rules = self._begin(input_ids, attention_mask, options)
        if chosen.num_beams == 1:
            tokens = list(self._tokens(input_ids, attention_mask, chosen, rules))
            return np.concatenate([input_ids, np.stack(tokens, axis=1)], axis=1)
        decoding = self.start(len(input_ids), rules.longest)
        logits = decoding.feed(input_ids, attention_mask)[:, -1]
        found = beam_search(decoding, logits, input_ids, chosen, rules)
        padded = np.full((len(found), max(map(len, found))), self._padding(rules))
        for row, text in zip(padded, found, strict=True):
            row[: len(text)] = text
        return padded

    def stream(self, input_ids: Array, attention_mask: Array | None = None, **options: Any) -> Iterator[Array]:
        """Continue prompts, yielding the next token of every row, [B], as soon as it is known.

        Raises UserError as ``generate`` does, and for beam search, which knows no token before the last.
        """
        chosen, rules = self._begin(input_ids, attention_mask, options)
        if chosen.num_beams > 1:
            raise UserError(f"num_beams: {chosen.num_beams} beams know no token before the last; stream with 1")
        return self._tokens(input_ids, attention_mask, chosen, rules)

    def _begin(self, input_ids: Array, attention_mask: Array | None, options: dict[str, Any]) -> tuple[Options, Rules]:
        chosen = Options(**options)
        _check_prompts(input_ids, attention_mask)
        length = input_ids.shape[1]
        self._check_length(length, chosen.max_new_tokens)
        ends = self._ends if chosen.eos_token_id is None else as_tokens(chosen.eos_token_id)
        return chosen, Rules.of(chosen, length, ends, self._session.get_outputs()[0].shape[-1])

    def _tokens(
        self, input_ids: Array, attention_mask: Array | None, options: Options, rules: Rules
    ) -> Iterator[Array]:
        generator = np.random.default_rng(options.seed)
        text = np.empty((len(input_ids), rules.longest), np.int64)
        text[:, : rules.start] = input_ids
        ended = np.zeros(len(input_ids), dtype=bool)
        decoding = self.start(*text.shape)
        logits = decoding.feed(input_ids, attention_mask)[:, -1]
        for length in range(rules.start, rules.longest):
            rules.apply(logits, text[:, :length])
            tokens = np.where(ended, self._padding(rules), choose(logits, options, generator))
            text[:, length] = tokens
            ended |= rules.ended(tokens)
            yield tokens
            if ended.all() or length + 1 == rules.longest:
                return
            logits = decoding.feed(tokens[:, None])[:, -1]

    def _padding(self, rules: Rules) -> int:
        return self._pad if self._pad is not None else int(next(iter(rules.ends), 0))

    def _check_length(self, length: int, new: int) -> None:
        if length + new > self._context:
            asked = f"{length} tokens of prompt and {new} new ones" if new else f"{length} tokens"
            raise UserError(f"input_ids: {asked} exceed the context of {self._context}")


def _check_prompts(input_ids: Array, attention_mask: Array | None) -> None:
    if input_ids.ndim != 2 or not input_ids.size:
        raise UserError(f"input_ids: the shape {input_ids.shape} is not [rows, tokens] with at least one of each")
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise UserError("attention_mask: a prompt ends in padding; pad on the left")


def decoding_settings(path: Path) -> dict[str, Any]:
    """What decoding needs of ``config.json`` and ``generation_config.json``; the latter goes first."""
    generation = path / "generation_config.json"
    settings, given = _json_object(path / "config.json"), _json_object(generation) if generation.exists() else {}
    contexts = [settings[name] for name in ("n_positions", "max_position_embeddings") if name in settings]
    if not contexts:
        raise ModelError(f"{path / 'config.json'}: names no number of positions")
    return settings | {name: value for name, value in given.items() if value is not None} | {"context": contexts[0]}


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.parent}: no readable {path.name} ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.parent}: {path.name} holds no JSON object")
    return value
