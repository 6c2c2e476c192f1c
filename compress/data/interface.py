"""The facts about a model that data preparation needs: context length, vocabulary size and special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from compress.models import context_of
from compress.models.structure import Task


@dataclass(frozen=True)
class ModelInterface:
    """Task, positions (``context``), vocabulary size and special token ids of a model."""

    task: Task
    context: int
    vocabulary: int
    pad: int = 0
    eos: int | None = None
    decoder_start: int | None = None

    @classmethod
    def of(cls, config: Any, tokenizer: Any = None) -> Self:
        """Read a transformers config. The tokenizer's ``pad`` and ``eos`` take precedence. ``pad`` may be ``eos``."""
        eos = _first(getattr(tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None))
        pad = _first(getattr(tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None), eos, 0)
        start = getattr(config, "decoder_start_token_id", None)
        return cls(
            task="seq2seq" if config.is_encoder_decoder else "causal",
            context=context_of(config),
            vocabulary=config.vocab_size,
            pad=pad,
            eos=eos,
            decoder_start=_first(start, eos, 0) if config.is_encoder_decoder else None,
        )


def _first(*ids: Any) -> Any:
    return next((token for token in ids if token is not None), None)
