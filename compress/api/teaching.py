"""Train a model in place, on data alone or under a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pydantic
import torch
from torch import nn

from compress.data import Split
from compress.engine.fitting import fit
from compress.engine.models import ancestry_of, checked, side_of, traits_of, undisturbed
from compress.engine.rows import as_split
from compress.engine.term_checks import term_problems
from compress.errors import ModelError, RecipeError, UserError
from compress.registry import TERMS
from compress.schema import Strict
from compress.surgery.layers import renumbered
from compress.surgery.quantization import weights_and_scales
from compress.training.config import TrainConfig
from compress.training.loop import Place, Trained
from compress.training.objective import LossTerm

Terms = Sequence[str | Mapping[str, Any] | LossTerm]
"""Loss terms: a name such as ``"adaptive_kl"``, ``{"type": "adaptive_kl", "head_mass": 0.5}``, or a term itself."""


def finetune(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    terms: Terms = ("cross_entropy",),
    eval_data: Any = None,
    block: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **training: Any,
) -> Trained:
    """Train a model in place on data alone.

    Args:
        model: a float32 GPT-2, BART or other supported model, or one that :func:`compress.quantize_` changed.
        data: texts, pairs, a ``datasets.Dataset`` or a ``DataLoader`` (see :mod:`compress.engine.rows`).
        tokenizer: the tokenizer of the model, needed for texts.
        terms: loss terms that need no teacher; the loss is their weighted sum.
        eval_data: data that chooses the best step; without it, the last step counts.
        block: tokens per row of running text; by default the context of the model.
        seed: seed of data order and dropout.
        progress: draw a progress bar.
        **training: fields of :class:`compress.training.config.TrainConfig`, such as ``steps``, ``lr`` and ``batch``.

    Returns:
        Steps, metrics and the training curve (``history``).

    Raises:
        UserError: an argument that cannot be used; the message names it, and the model stays as it was.
        DivergedError: a loss that became infinite or NaN; the model then holds the weights of that step.

    Examples:
        >>> compress.finetune(model, train, tokenizer=tokenizer, steps=2, batch=2, progress=False).steps
        2
    """
    return fitted(model, terms, Asked(data, tokenizer, block, seed, progress, training), eval_data)


def distill(
    student: nn.Module,
    *,
    teacher: nn.Module,
    data: Any,
    tokenizer: Any = None,
    terms: Terms = ("adaptive_kl",),
    eval_data: Any = None,
    block: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **training: Any,
) -> Trained:
    """Train a student in place to match a teacher.

    The default term is adaptive KL (Wu et al. 2024, arXiv 2404.02657). The teacher is only read.

    Args:
        student: a float32 model, or one that :func:`compress.quantize_` changed (quantization-aware training).
        teacher: a model with the same vocabulary. Terms that compare unit by unit (``causal_kv``, ``hidden_mse``) need
            the model that the student was cut from, or one trained from it.
        data: as in :func:`finetune`.
        tokenizer: as in :func:`finetune`.
        terms: loss terms; the loss is their weighted sum.
        eval_data: as in :func:`finetune`.
        block: as in :func:`finetune`.
        seed: as in :func:`finetune`.
        progress: as in :func:`finetune`.
        **training: as in :func:`finetune`.

    Returns:
        Steps, metrics and the training curve (``history``).

    Raises:
        UserError: an argument that cannot be used; the message names it, and the student stays as it was.
        DivergedError: a loss that became infinite or NaN.

    Examples:
        >>> terms = ["adaptive_kl", {"type": "causal_kv", "weight": 0.1}]
        >>> small = compress.prune(model, compress.score(model), keep="2/4")
        >>> done = compress.distill(
        ...     small, teacher=model, data=train, tokenizer=tokenizer, terms=terms, steps=2, batch=2, progress=False
        ... )
        >>> sorted(done.history[0]["terms"])
        ['adaptive_kl', 'causal_kv']
    """
    checked(teacher, "teacher", forbids=("masked",))
    if teacher is student:
        raise ModelError("teacher: is the student itself; give another model, such as copy.deepcopy(student)")
    asked = Asked(data, tokenizer, block, seed, progress, training)
    return fitted(student, terms, asked, eval_data, name="student", teacher=teacher)


@dataclass(frozen=True)
class Asked:
    """What every function that trains takes: data, how it is read, and how to train."""

    data: Any
    tokenizer: Any
    block: int | None
    seed: int
    progress: bool
    training: Mapping[str, Any]

    def rows(self, model: Any) -> Split:
        """The data as rows for this model."""
        return as_split(self.data, model.config, self.tokenizer, name="data", block=self.block)

    def config(self) -> TrainConfig:
        """The training settings, of which at least one step must follow."""
        config: TrainConfig = configured(TrainConfig, **self.training)
        if config.steps == 0:
            raise UserError("steps: is 0, so nothing would be trained; allowed: whole numbers from 1")
        return config

    def place(self, model: nn.Module, name: str) -> Place:
        """The device of the model, and no directory."""
        return Place(None, device=device_of(model).type, seed=self.seed, bar=self.progress, name=name)


def fitted(
    model: nn.Module,
    terms: Terms,
    asked: Asked,
    eval_data: Any,
    *,
    name: str = "model",
    teacher: nn.Module | None = None,
) -> Trained:
    """Check every argument, then train ``model`` in place; what :func:`finetune` and :func:`distill` both do."""
    family = checked(model, name, forbids=("masked",))
    config, chosen = asked.config(), read_terms(terms)
    require_terms(chosen, model, teacher)
    rows = asked.rows(model)
    if teacher is not None:
        require_alike(teacher, model, "teacher", rows)
    judged = None
    if eval_data is not None:
        judged = as_split(eval_data, model.config, asked.tokenizer, name="eval_data", block=asked.block)
    weights, scales = weights_and_scales(model)
    if config.lr == 0 and not (scales and config.scale_lr):
        raise UserError("lr: is 0, so no weight would train; allowed: numbers above 0")
    with undisturbed(model, teacher):
        reference = None
        if teacher is not None and any(term.needs_teacher for term in chosen):
            reference = side_of(teacher.to(device_of(model)).requires_grad_(False).eval(), checked(teacher))
        done = fit(
            side_of(model, family),
            chosen,
            config,
            asked.place(model, name),
            data=rows,
            evaluate=judged,
            teacher=reference,
            groups={"weights": weights, "scales": scales},
        )
    model.zero_grad(set_to_none=True)
    return done


def require_alike(other: Any, model: Any, name: str, rows: Split) -> None:
    """Raise ModelError where another model cannot read the rows of this one."""
    theirs, ours = checked(other, name), checked(model)
    if theirs.task != ours.task:
        raise ModelError(f"{name}: is a {theirs.task} model, but the rows are for a {ours.task} model")
    if other.config.vocab_size != model.config.vocab_size:
        raise ModelError(
            f"{name}: has a vocabulary of {other.config.vocab_size} tokens, but the model has "
            f"{model.config.vocab_size}; they must use the same vocabulary"
        )
    if rows.longest > (context := theirs.positions(other.config)):
        raise ModelError(
            f"{name}: accepts at most {context} tokens, but rows have up to {rows.longest}; give a smaller block"
        )


def read_terms(terms: Terms) -> list[LossTerm]:
    """Loss terms from their names, mappings or themselves."""
    if isinstance(terms, str | Mapping):
        terms = [terms]
    found: list[LossTerm] = []
    for at, term in enumerate(terms):
        if isinstance(term, LossTerm):
            found.append(term)
            continue
        if not isinstance(term, str | Mapping):
            raise UserError(f"terms[{at}]: a {type(term).__name__} is not a term; give a name such as 'adaptive_kl'")
        given = {"type": term} if isinstance(term, str) else dict(term)
        try:
            found.append(configured(TERMS.get(given.get("type")), where=f"terms[{at}]", **given))
        except RecipeError as error:
            raise UserError(f"terms[{at}]: {error}") from None
    return found


def require_terms(
    terms: Sequence[LossTerm], model: nn.Module, teacher: nn.Module | None, *, masked: bool = False
) -> None:
    """Raise UserError for terms that cannot work with these models."""
    student = _known(model, "student")
    other = None if teacher is None else _known(teacher, "teacher")
    if other is not None and "pruned" not in other.traits and _descends(student, other, model):
        student.root = other.root
    if problem := next(term_problems(terms, student, other, masked=masked), None):
        raise UserError(problem)


def _descends(student: _Known, teacher: _Known, model: Any) -> bool:
    """Whether the teacher has the units of the student's root, in the layers that the student kept."""
    if teacher.layers:
        return dict(teacher.layers) == dict(student.layers) and dict(teacher.sizes) == dict(student.root_sizes)
    return renumbered(checked(model), teacher.sizes, student.layers) == dict(student.root_sizes)


@dataclass
class _Known:
    name: str
    config: Any
    sizes: Mapping[str, int]
    layers: Mapping[str, Sequence[int]]
    traits: frozenset[str]
    root: str
    root_sizes: Mapping[str, int] = field(default_factory=dict)


def _known(model: Any, name: str) -> _Known:
    family = checked(model, name)
    known = ancestry_of(model, family)
    sizes = {axis: len(known.kept.get(axis, range(size))) for axis, size in known.sizes.items()}
    root = "root" if name == "student" else name
    return _Known(name, model.config, sizes, known.layers, traits_of(model), root, known.sizes)


def configured(kind: type[Strict], *, where: str = "", **values: Any) -> Any:
    """Build a config; the first thing that is wrong with it becomes one line that names the argument."""
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        found = error.errors()
        first = next((each for each in found if not each["type"].endswith("_type")), found[0])
        place = ".".join(part for part in map(str, first["loc"]) if part.isidentifier())
        given = "" if isinstance(first["input"], Mapping) or not place else f" (given: {first['input']!r})"
        text = first["msg"].removeprefix("Value error, ")
        raise UserError(": ".join(filter(None, [where, place, text])) + given) from None


def device_of(model: nn.Module) -> torch.device:
    """Where a model lives."""
    return next(model.parameters()).device
