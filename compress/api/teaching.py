"""Train a model in place, on data alone or with a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compress.api.arguments import configured
from compress.api.asked import Asked, idle_settings
from compress.data import Split
from compress.engine.fitting import fit
from compress.engine.models import ancestry_of, checked, side_of, traits_of, undisturbed
from compress.engine.rows import as_split
from compress.engine.term_checks import term_problems
from compress.errors import ModelError, UserError
from compress.problem import Problem
from compress.registry import TERMS
from compress.surgery.layers import renumbered
from compress.surgery.quantization import stored, weights_and_scales
from compress.training.loop import Trained
from compress.training.objective import LossTerm, StateTerm

Terms = Sequence[str | Mapping[str, Any] | LossTerm]
"""Loss terms: a name such as ``"adaptive_kl"``, ``{"type": "adaptive_kl", "head_mass": 0.5}``, or a term object."""


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
    """Train a model in place on data, without a teacher.

    Args:
        model: a float32 GPT-2, BART or other supported model, or one that :func:`compress.quantize_` changed.
        data: texts, pairs, a ``datasets.Dataset`` or a ``DataLoader`` (see :mod:`compress.engine.rows`).
        tokenizer: the tokenizer of the model, needed for texts.
        terms: loss terms that need no teacher; the loss is their weighted sum.
        eval_data: data to choose the best step by; without it, the weights of the last step are kept.
        block: number of tokens per row of running text, and the largest number in a prompt with its response; by
            default the context length of the model.
        seed: seed of data order and dropout, below 2^32.
        progress: draw a progress bar.
        **training: fields of :class:`compress.training.config.TrainConfig`, such as ``steps``, ``lr`` and ``batch``. A
            field that would have no effect is an error.

    Returns:
        The number of steps, the metrics and the training curve (``history``).

    Raises:
        UserError: an argument cannot be used. The message names it, and the model is unchanged.
        DivergedError: a loss became infinite or NaN. The model keeps the weights of that step.

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

    The default term is adaptive KL (Wu et al. 2024, arXiv 2404.02657). The teacher is not changed. If it
    is on another device, it is moved to the student's device for the training and then back.

    Args:
        student: a float32 model, or one that :func:`compress.quantize_` changed (quantization-aware training).
        teacher: a model with the same vocabulary. Terms that compare unit by unit (``causal_kv``, ``hidden_mse``) need
            the model that the student was pruned from, or a model trained from that.
        data: as in :func:`finetune`.
        tokenizer: as in :func:`finetune`.
        terms: loss terms; the loss is their weighted sum. At least one of them must compare with the teacher.
        eval_data: as in :func:`finetune`.
        block: as in :func:`finetune`.
        seed: as in :func:`finetune`.
        progress: as in :func:`finetune`.
        **training: as in :func:`finetune`.

    Returns:
        The number of steps, the metrics and the training curve (``history``).

    Raises:
        UserError: an argument cannot be used. The message names it, and the student is unchanged.
        DivergedError: a loss became infinite or NaN.

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


def fitted(
    model: nn.Module,
    terms: Terms,
    asked: Asked,
    eval_data: Any,
    *,
    name: str = "model",
    teacher: nn.Module | None = None,
) -> Trained:
    """Check every argument, and then train ``model`` in place. :func:`finetune` and :func:`distill` share this."""
    family = checked(model, name, forbids=("masked",))
    if any(weight.weight.requires_grad for weight in stored(model)):
        raise ModelError(
            f"{name}: was loaded from packed codes, which cannot train, but requires_grad of a quantized weight is "
            "True; set it to False, or apply quantize_ to a float model and train that"
        )
    chosen = read_terms(terms)
    require_terms(chosen, model, teacher)
    require_teacher_read(chosen, teacher)
    weights, scales = weights_and_scales(model)
    idle = idle_settings(
        weights=any(each.requires_grad for each in weights),
        scales=any(each.requires_grad for each in scales),
        parts=trains_parts(chosen),
        judged=eval_data is not None,
    )
    config = asked.config(idle)
    rows = asked.rows(model)
    if teacher is not None:
        require_alike(teacher, model, "teacher", rows)
    judged = None
    if eval_data is not None:
        judged = as_split(eval_data, model.config, asked.tokenizer, name="eval_data", block=asked.block)
    if config.lr == 0 and not (scales and config.scale_lr):
        raise UserError("lr: is 0, so no weight would train; allowed: numbers above 0")
    with undisturbed(model, teacher):
        reference = None
        if teacher is not None:
            reference = side_of(teacher.requires_grad_(False).eval(), checked(teacher))
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
    """Raise ModelError if ``other`` cannot read the rows that were made for ``model``."""
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
    """Return loss terms that are given as names, mappings or term objects."""
    if isinstance(terms, str | Mapping | LossTerm):
        terms = [terms]
    if not isinstance(terms, Sequence) or isinstance(terms, bytes):
        raise UserError(f"terms: expected a list of terms such as ['adaptive_kl'], got {type(terms).__name__}")
    found: list[LossTerm] = []
    for at, term in enumerate(terms):
        if isinstance(term, LossTerm):
            found.append(term)
            continue
        if not isinstance(term, str | Mapping):
            text = f"expected the name of a term such as 'adaptive_kl', got {type(term).__name__}"
            raise UserError(Problem(("terms", at), text))
        given = {"type": term} if isinstance(term, str) else dict(term)
        if odd := next((key for key in given if not isinstance(key, str)), None):
            text = f"has the key {odd!r}; give names such as 'type' and 'weight'"
            raise UserError(Problem(("terms", at), text))
        try:
            found.append(configured(TERMS.get(given.get("type")), **given))
        except UserError as error:
            raise UserError(error.problem.inside("terms", at)) from None
    if not found:
        raise UserError(Problem(("terms",), "is empty; give at least one term"))
    return found


def require_teacher_read(terms: Sequence[LossTerm], teacher: nn.Module | None) -> None:
    """Raise UserError if there is a teacher but no term compares with it."""
    if teacher is not None and not any(term.needs_teacher for term in terms):
        names = ", ".join(term.type for term in terms)
        raise UserError(
            f"teacher: would change nothing, because none of the terms ({names}) compares with it; add one such as "
            "adaptive_kl, or leave teacher out"
        )


def trains_parts(terms: Sequence[LossTerm]) -> bool:
    """Return whether a term has parts of its own that train, such as projections."""
    return any(isinstance(term, StateTerm) and type(term).module is not StateTerm.module for term in terms)


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
    """Return whether the teacher has the units of the student's original model (root), in the layers it kept."""
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
