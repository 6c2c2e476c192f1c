"""Text generation from an exported directory. A deployed process needs only numpy and onnxruntime.

    runtime = Runtime.open("model-onnx", threads=2)
    tokens = runtime.generate(np.array([[464, 3290]]), max_new_tokens=16, num_beams=4)

Shapes: B rows, T tokens, V tokens of the vocabulary. Pad prompts of unequal length on the left, with 0 at the padding
in ``attention_mask``. Tokens and masks are arrays, or lists of rows of equal length. They are checked when a text
begins; ``feed`` does not check them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from compress.errors import ModelError, UserError
from compress.onnx.names import DECODER_FILE, ENCODER_FILE, MODEL_FILE
from compress.onnx.runtime.beams import beam_search
from compress.onnx.runtime.opening import decoding_settings, open_session
from compress.onnx.runtime.prompts import prompts
from compress.onnx.runtime.sampling import Options, Rules, as_tokens, choose, is_whole
from compress.onnx.runtime.seq2seq_session import Seq2SeqDecoding
from compress.onnx.runtime.session import Array, Decoding

MOST_THREADS = 1024


class Runtime:
    """An exported model opened for decoding: a decoder-only model, or an encoder-decoder model."""

    def __init__(self, sessions: Mapping[str, ort.InferenceSession], settings: dict[str, Any]) -> None:
        self._sessions = sessions
        self._forced = {name: settings.get(name) for name in ("forced_bos_token_id", "forced_eos_token_id")}
        self._context: int = settings["context"]
        self._ends = as_tokens(settings.get("eos_token_id"))
        start = settings.get("decoder_start_token_id")
        self._start = next(iter(self._ends), 0) if start is None else int(start)
        self._pad: int | None = settings.get("pad_token_id")
        decoder = sessions[DECODER_FILE if self.reads_sources else MODEL_FILE]
        self._vocabulary: int = decoder.get_outputs()[0].shape[-1]
        if self.reads_sources and not 0 <= self._start < self._vocabulary:
            raise ModelError(
                f"decoder_start_token_id {self._start} is not a token of the vocabulary, 0 to {self._vocabulary - 1}"
            )

    @classmethod
    def open(cls, directory: str | Path, threads: int | None = None) -> Runtime:
        """Open an exported directory; with ``threads`` None, onnxruntime uses every core."""
        if threads is not None and not (is_whole(threads) and 1 <= threads <= MOST_THREADS):
            raise UserError(f"threads: {threads!r} is not a whole number from 1 to {MOST_THREADS}, or None")
        path = Path(directory)
        pair = (ENCODER_FILE, DECODER_FILE)
        files = pair if any((path / file).exists() for file in pair) else (MODEL_FILE,)
        return cls({file: open_session(path / file, threads) for file in files}, decoding_settings(path))

    @property
    def files(self) -> str:
        """The names of the opened graphs, for messages."""
        return ", ".join(self._sessions)

    @property
    def reads_sources(self) -> bool:
        """True for an encoder-decoder model: its input is a source to respond to, not a prompt to continue."""
        return ENCODER_FILE in self._sessions

    @property
    def context(self) -> int:
        """The largest number of tokens in a row, prompt and new tokens together."""
        return self._context

    def logits(self, input_ids: Any, attention_mask: Any = None) -> Array:
        """Return logits of whole sequences, [B, T] -> [B, T, V]."""
        self._require_sources(False, "logits", "answer")
        ids, mask = self._read(input_ids, attention_mask)
        return self.start(*ids.shape).feed(ids, mask)

    def start(self, batch: int, capacity: int | None = None) -> Decoding:
        """Start to decode a batch step by step: ``feed`` takes a prompt, then one or more tokens at a time."""
        self._require_sources(False, "start", "answer")
        sizes = {"batch": (batch, None), "capacity": (self._context if capacity is None else capacity, self._context)}
        for name, (value, most) in sizes.items():
            if not isinstance(value, Integral) or value < 1 or (most and value > most):
                allowed = "of at least 1" if most is None else f"from 1 to the context of {most}"
                raise UserError(f"{name}: {value!r} is not a whole number {allowed}")
        return Decoding(self._sessions[MODEL_FILE], batch, sizes["capacity"][0])

    def answer(self, input_ids: Any, attention_mask: Any = None) -> Seq2SeqDecoding:
        """Start to decode responses to sources [B, R] step by step: ``feed`` takes the tokens of the responses."""
        self._require_sources(True, "answer", "start or logits")
        return self._answer(*self._read(input_ids, attention_mask))

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Array:
        """Continue prompts: [B, T] -> [B, T + new] int64; ``options`` are those of :class:`Options`.

        Generation stops when every row has ended; a row that ended earlier is filled with padding. Raises UserError for
        an option out of range, for a number that is not a token, and for a prompt that is empty, ends in padding, or
        leaves too little of the context.
        """
        ids, mask, chosen, rules = self._checked(input_ids, attention_mask, options)
        given = self.given(ids)
        if chosen.num_beams == 1:
            tokens = list(self._tokens(ids, mask, chosen, rules))
            return np.concatenate([given, np.stack(tokens, axis=1)], axis=1)
        decoding, logits = self._begin(ids, mask, rules.longest)
        found = beam_search(decoding, logits, given, chosen, rules)
        padded = np.full((len(found), max(map(len, found))), self._padding(rules))
        for row, text in zip(padded, found, strict=True):
            row[: len(text)] = text
        return padded

    def stream(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Iterator[Array]:
        """Continue prompts and yield the next token of every row, [B], as soon as it is known.

        Raises UserError as ``generate`` does, and for beam search, whose tokens are known only at the end.
        """
        ids, mask, chosen, rules = self._checked(input_ids, attention_mask, options)
        if chosen.num_beams > 1:
            raise UserError(
                f"num_beams: beam search with {chosen.num_beams} beams has its tokens only at the end; "
                "use num_beams 1 to stream"
            )
        return self._tokens(ids, mask, chosen, rules)

    def begin(
        self, input_ids: Any, attention_mask: Any = None, longest: int | None = None
    ) -> tuple[Decoding | Seq2SeqDecoding, Array]:
        """Read prompts or sources; return the decoding state and the logits [B, V] of the first new token.

        ``longest`` is the largest number of tokens in a row, those of :meth:`given` and new ones together.
        """
        ids, mask = self._read(input_ids, attention_mask)
        if longest is not None and not self.given(ids).shape[1] <= longest <= self._context:
            raise UserError(
                f"longest: {longest} is out of range; it must be at least the number of tokens given and at most the "
                f"context of {self._context}"
            )
        return self._begin(ids, mask, longest)

    def given(self, input_ids: Any) -> Array:
        """Return the tokens before the new ones: the prompts, or for sources the start token of each response."""
        return np.full((len(input_ids), 1), self._start) if self.reads_sources else np.asarray(input_ids)

    def _begin(self, ids: Array, mask: Array | None, longest: int | None) -> tuple[Decoding | Seq2SeqDecoding, Array]:
        given = self.given(ids)
        if self.reads_sources:
            response = self._answer(ids, mask)
            return response, response.read(given)
        decoding = self.start(len(given), longest)
        return decoding, decoding.read(given, mask)

    def _answer(self, ids: Array, mask: Array | None) -> Seq2SeqDecoding:
        return Seq2SeqDecoding(self._sessions[ENCODER_FILE], self._sessions[DECODER_FILE], ids, mask, self._context)

    def _read(self, input_ids: Any, attention_mask: Any) -> tuple[Array, Array | None]:
        ids, mask = prompts(input_ids, attention_mask, self._vocabulary)
        self._check_length(ids.shape[1], 0)
        return ids, mask

    def _require_sources(self, wanted: bool, method: str, instead: str) -> None:
        if self.reads_sources != wanted:
            does = "responds to sources" if self.reads_sources else "continues prompts"
            raise UserError(f"{method}: this model {does} ({self.files}); use {instead}, or begin")

    def _checked(
        self, input_ids: Any, attention_mask: Any, options: dict[str, Any]
    ) -> tuple[Array, Array | None, Options, Rules]:
        own = {name: value for name, value in self._forced.items() if options.get(name) is None}
        chosen = Options.read({**options, **own})
        ids, mask = prompts(input_ids, attention_mask, self._vocabulary)
        if not self.reads_sources:
            _check_ends(mask)
        else:
            self._check_length(ids.shape[1], 0)
        start = self.given(ids).shape[1]
        self._check_length(0 if self.reads_sources else start, chosen.max_new_tokens)
        ends = self._ends if chosen.eos_token_id is None else as_tokens(chosen.eos_token_id)
        return ids, mask, chosen, Rules.of(chosen, start, ends, self._vocabulary)

    def _tokens(self, ids: Array, mask: Array | None, options: Options, rules: Rules) -> Iterator[Array]:
        generator = np.random.default_rng(options.seed)
        given = self.given(ids)
        text = np.empty((len(given), rules.longest), np.int64)
        text[:, : rules.start] = given
        ended = np.zeros(len(given), dtype=bool)
        decoding, logits = self._begin(ids, mask, rules.longest)
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
            needed = (
                f"input_ids: {length} tokens of prompt and {new} new ones" if new else f"input_ids: {length} tokens"
            )
            needed = needed if length else f"max_new_tokens: {new} tokens"
            raise UserError(f"{needed} exceed the context of {self._context}")


def _check_ends(attention_mask: Array | None) -> None:
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise UserError("attention_mask: a prompt ends in padding; pad on the left")
