"""Checks of generated responses in seq_kd, in stages that train on its targets, and in on_policy training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from compress.data import Data, ModelInterface
from compress.data.targets import prompts_of
from compress.errors import DataError
from compress.models import context_of
from compress.pipeline.inputs import Inputs
from compress.pipeline.teacher_checks import difference
from compress.problem import Location, Problem
from compress.recipe.references import GENERATED, Link
from compress.stages.stage import Shape

_UNPROMPTED = (
    "responds to prompts or sources, but data.train has none; give prompt and response, source and target, or labels"
)


@dataclass(frozen=True)
class _Answers:
    """Responses of at most ``new`` tokens to the prompts of ``data.train``."""

    data: Data
    new: int
    field: Location
    """The field of the stage that asks for them."""
    whose: str = ""
    """Whose responses they are, if another stage generates them."""

    @cached_property
    def before(self) -> int:
        """The maximum number of prompt tokens before a response in one row. It is 0 for an encoder-decoder."""
        assert self.data.train is not None
        return max(map(len, prompts_of(self.data.train))) if self.data.train.model.task == "causal" else 0

    def problems(self, *models: Shape, cut: bool) -> Iterator[Problem]:
        """Report models whose positions the responses exceed, and with ``cut`` also the limits of the data."""
        spec = self.data.spec
        try:
            length = self.before + self.new
        except DataError as error:
            yield error.problem
            return
        limits = [(f"{model.name!r} accepts at most", context_of(model.config)) for model in models]
        if cut and spec.block and not models[0].config.is_encoder_decoder:
            limits.append(("data.block allows", spec.block))
        tokens = f"{self.whose}{self.new} new tokens"
        after = f" after up to {self.before} of data.train" if self.before else ""
        for what, most in limits:
            if length > most:
                yield Problem(self.field, f"{tokens}{after}; {what} {most}")
        if cut and spec.max_target and self.new > spec.max_target:
            yield Problem(self.field, f"{tokens}; data.max_target allows {spec.max_target}")


def answer_problems(
    inputs: Inputs, item: Link, links: Sequence[Link], shapes: Mapping[str, Shape]
) -> Iterator[Problem]:
    """Yield problems of a stage that generates responses or trains on them. Paths start at a field of the stage."""
    data, stage = inputs.data(item.root), item.stage
    student = shapes[item.source]
    on_policy = getattr(stage, "on_policy", None)
    if GENERATED in stage.gives:
        if data is None or data.train is None:
            yield Problem((), f"{stage.type} responds to the rows of data.train, but there is no data.train")
            return
        if not _prompted(data):
            yield Problem((), f"{stage.type} {_UNPROMPTED}")
            return
        decoding: Any = stage
        found = _Answers(data, decoding.decoding.max_new_tokens, ("decoding", "max_new_tokens"))
        yield from found.problems(student, cut=True)
    if item.targets:
        yield from _target_problems(inputs, item, links, shapes)
    if on_policy and data and data.train:
        if not _prompted(data):
            yield Problem(("on_policy",), _UNPROMPTED)
            return
        models = (student, *([shapes[item.teacher]] if item.teacher else []))
        found = _Answers(data, on_policy.max_new_tokens, ("on_policy", "max_new_tokens"))
        yield from found.problems(*models, cut=False)


def longest_answer(inputs: Inputs, item: Link, links: Sequence[Link]) -> int | None:
    """Return the largest number of predicting positions in a row with generated targets, or None without targets."""
    found = _taken(inputs, item, links)
    if found is None:
        return None
    return found.new + max(found.before - 1, 0)


def _taken(inputs: Inputs, item: Link, links: Sequence[Link]) -> _Answers | None:
    """Return the responses that a stage trains on."""
    maker = next((other for other in links if other.name == item.targets), None)
    data = inputs.data(maker.root) if maker else None
    if maker is None or data is None or data.train is None:
        return None
    stage: Any = maker.stage
    return _Answers(data, stage.decoding.max_new_tokens, ("targets",), f"responses of {item.targets!r}: ")


def _target_problems(
    inputs: Inputs, item: Link, links: Sequence[Link], shapes: Mapping[str, Shape]
) -> Iterator[Problem]:
    if getattr(getattr(item.stage, "train", None), "steps", None) == 0:
        yield Problem(("targets",), "train.steps is 0, so nothing is trained on them")
        return
    made, student = shapes[str(item.targets)], shapes[item.source]
    if text := _unlike(inputs, made, student):
        yield Problem(("targets",), f"{item.targets!r} was generated by {text}")
    elif found := _taken(inputs, item, links):
        models = (student, *([shapes[item.teacher]] if item.teacher else []))
        yield from found.problems(*models, cut=False)


def _unlike(inputs: Inputs, made: Shape, student: Shape) -> str:
    """Return the model that generated targets, and what the student lacks to train on them. Empty if they are alike."""
    tokenizers = [inputs.tokenizer(root) for root in (student.root, made.root)]
    mine, theirs = (
        ModelInterface.of(shape.config, tokenizer) for shape, tokenizer in zip((student, made), tokenizers, strict=True)
    )
    name = f"the student {student.name!r}"
    if mine.task != theirs.task:
        return f"a {theirs.task} model, but {name} is a {mine.task} model"
    if mine.vocabulary != theirs.vocabulary:
        return (
            f"a model with a vocabulary of {theirs.vocabulary} tokens, but {name} has {mine.vocabulary}; "
            "they must use the same vocabulary"
        )
    if None not in tokenizers and (at := difference(*tokenizers)):
        return (
            f"a model with another vocabulary than {name}: token {at[0]} is {at[2]!r} for the generator and "
            f"{at[1]!r} for the student; they must use the same vocabulary"
        )
    if mine.eos != theirs.eos:
        return f"a model that ends with token {theirs.eos}, but {name} ends with {mine.eos}"
    return ""


def _prompted(data: Data) -> bool:
    """Return whether the training rows mark their prompts. Rows of an encoder-decoder always do."""
    source, split = data.spec.train, data.train
    return bool(split and source and (split.model.task == "seq2seq" or source.prompted))
