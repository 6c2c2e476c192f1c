"""How text is generated, in one place for torch and ONNX. Shapes: B rows, T positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import GenerationConfig

from compress.artifact import Artifact
from compress.data import ModelInterface
from compress.onnx.runtime.opening import decoding_settings
from compress.onnx.runtime.sampling import LEAST_TEMPERATURE, as_tokens
from compress.schema import Strict, added


class Generation(Strict):
    """How text is generated. Every choice is stated; a model's own generation defaults are not used.

    A setting without effect is rejected.
    """

    renamed: ClassVar[Mapping[str, str]] = {"beams": "num_beams", "no_repeat_ngram": "no_repeat_ngram_size"}

    max_new_tokens: int = Field(64, ge=1)
    num_beams: int = Field(1, ge=1)
    length_penalty: float = 1.0
    """Beam search divides scores by length to this power."""
    do_sample: bool = False
    temperature: float = Field(1.0, ge=LEAST_TEMPERATURE)
    top_k: int = Field(0, ge=0)
    """Number of most probable tokens to sample from; 0 for all."""
    top_p: float = Field(1.0, gt=0, le=1)
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = added(0)
    """N-grams of this many tokens may not repeat, counting a continued prompt; 0 allows all repetitions."""
    min_new_tokens: Annotated[int, Field(ge=0)] = added(0)
    """Minimum number of new tokens of a text."""

    @model_validator(mode="after")
    def _room_for_the_least(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: {self.min_new_tokens} is more than max_new_tokens: {self.max_new_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _without_idle(self) -> Self:
        given = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        if self.do_sample and (idle := sorted(given & {"num_beams", "length_penalty"})):
            raise ValueError(f"{idle[0]} applies only to beam search, but do_sample: true samples; leave one out")
        if not self.do_sample and (idle := sorted(given & {"temperature", "top_k", "top_p", "seeds"})):
            raise ValueError(f"{idle[0]} does nothing without do_sample: true")
        if self.num_beams == 1 and "length_penalty" in given:
            raise ValueError("length_penalty does nothing without num_beams above 1")
        return self

    def options(self) -> dict[str, Any]:
        """Return the settings that have an effect, under the names that ``generate`` of both runtimes uses."""
        found = self.model_dump(include={"max_new_tokens", "do_sample", "min_new_tokens"})
        found |= {"no_repeat_ngram_size": self.no_repeat_ngram_size} if self.no_repeat_ngram_size else {}
        if self.do_sample:
            return found | self.model_dump(include={"temperature", "top_k", "top_p"})
        return found | (
            {"num_beams": self.num_beams, "length_penalty": self.length_penalty} if self.num_beams > 1 else {}
        )


class Decoding(Generation):
    """How the text of a measurement is generated, and with which seeds if it is sampled."""

    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    """Seeds of sampling. Each seed generates once, and the mean and standard deviation are reported."""

    @property
    def runs(self) -> tuple[int, ...]:
        """The seeds to generate with. Without sampling, only one."""
        return self.seeds if self.do_sample else self.seeds[:1]

    def conditions(self) -> dict[str, Any]:
        """Return the settings that have an effect, under their names in a recipe."""
        if self.do_sample:
            return self.model_dump(exclude={"num_beams", "length_penalty"})
        penalty = {"length_penalty"} if self.num_beams > 1 else set()
        rules = {"no_repeat_ngram_size", "min_new_tokens"}
        return self.model_dump(include={"max_new_tokens", "do_sample", "num_beams"} | penalty | rules)


def ends_of(artifact: Artifact, tokenizer: Any) -> list[int]:
    """Return the end tokens of a model in either runtime, from its generation settings and its tokenizer."""
    own = as_tokens(decoding_settings(artifact.path).get("eos_token_id"))
    return list(dict.fromkeys([*own, *as_tokens(getattr(tokenizer, "eos_token_id", None))]))


def forced_tokens(config: Any) -> dict[str, Any]:
    """Return the tokens with which the responses of a model must begin and end, in either runtime."""
    return {name: getattr(config, name, None) for name in ("forced_bos_token_id", "forced_eos_token_id")}


def generation_settings(config: Any, tokenizer: Any, ends: Sequence[int], decoding: Generation) -> GenerationConfig:
    """Convert ``decoding`` for ``generate``. Only the special tokens come from the model's own settings."""
    known = ModelInterface.of(config, tokenizer)
    chosen = decoding.options()
    if known.task == "seq2seq":
        chosen |= {"decoder_start_token_id": known.decoder_start}
        chosen |= forced_tokens(config)
    special = {"pad_token_id": known.pad, "eos_token_id": list(ends) or None, "bos_token_id": config.bos_token_id}
    return GenerationConfig(**special, **chosen)


def padded(rows: Sequence[list[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids [B, T] and attention mask [B, T] of rows padded to the longest row."""
    width = max(map(len, rows))
    gaps = [[pad] * (width - len(row)) for row in rows]
    ids = [gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [[0] * len(gap) + one if left else one + [0] * len(gap) for one, gap in zip(ones, gaps, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def until_end(row: list[int], end: int | Sequence[int] | None) -> list[int]:
    """Return the tokens before the first end token."""
    ends = as_tokens(end)
    return row[: next((at for at, token in enumerate(row) if token in ends), len(row))]


def through_end(row: list[int], end: int | Sequence[int] | None) -> list[int]:
    """Return the tokens up to and including the first end token."""
    return row[: len(until_end(row, end)) + 1]
