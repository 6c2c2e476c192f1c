"""The training objective: a weighted sum of loss terms over one student and one teacher forward pass per step.

Shapes: B batch, T positions, N positions that count in the loss, D hidden size, V vocabulary, K number of logit terms.

Vocabulary-sized tensors exist for one chunk of tokens at a time. The body runs once. The head runs chunk by chunk, and
the gradient of each chunk is computed immediately. Peak memory does not grow with batch x length x vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.functional.chunked import chunked_means
from compress.models.family import ModelFamily
from compress.models.layout import is_product
from compress.models.structure import IGNORE, Attention
from compress.problem import Problem
from compress.schema import Strict
from compress.surgery.quantization import operands
from compress.training.forward import Batch, Side, View, chunk_size, logits_of, run_body, watch


class Outline(Protocol):
    """What is known of a model before any work: config, size of each prunable dimension (axis), and layers it kept.

    The root is the original, uncut model. ``layers`` is a dict from stack (encoder or decoder) name to layer numbers.
    """

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> Any: ...
    @property
    def sizes(self) -> Mapping[str, int]: ...
    @property
    def layers(self) -> Mapping[str, Sequence[int]]: ...


class LossTerm(Strict):
    """One weighted term of an objective, as written in a recipe."""

    type: str
    weight: float = Field(1.0, gt=0)

    needs_teacher: ClassVar[bool] = True
    needs_masks: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    """Whether the term needs labels, the tokens of the data. Other terms compare student and teacher on any tokens."""
    needs_ancestor: ClassVar[bool] = False
    """Whether the term compares unit by unit (heads, FFN neurons, hidden dimensions). If so, the teacher must have all
    units of the student's original model (root)."""

    def problems(self, student: Outline, teacher: Outline | None) -> Iterator[Problem]:
        """Problems with these models that can be found before any work. Paths start at a field of this term."""
        return iter(())


class LogitTerm(LossTerm):
    """A term that compares vocabulary distributions token by token."""

    def per_token(self, student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor) -> Tensor:
        """Return the loss of each token, [N], in float32."""
        raise NotImplementedError


class StateTerm(LossTerm):
    """A term over hidden states, projections, or parameters of student and teacher."""

    hidden: ClassVar[bool] = False
    """The term reads the hidden states of every layer."""

    def attentions(self, family: ModelFamily, config: Any) -> Sequence[Attention]:
        """Return the attentions whose query, key and value outputs the term reads; none by default."""
        return ()

    def module(self, student: Side, teacher: Side) -> nn.Module | None:
        """Trainable parts of the term (projections, memory bank), or None."""
        return None

    @property
    def numbered(self) -> bool:
        """Whether the term stores data per training row, so that each batch must contain its row numbers."""
        return False

    def room_problems(self, rows: int, longest: int) -> Iterator[Problem]:
        """Problems of a numbered term with ``rows`` rows of at most ``longest`` predicted positions each."""
        return iter(())

    def make_room(self, module: nn.Module | None, rows: int, longest: int) -> None:
        """Allocate storage in a numbered term's module before the first step. Arguments: :meth:`room_problems`."""

    def loss(self, student: View, teacher: View | None, module: nn.Module | None) -> Tensor:
        """Return the scalar loss of a batch."""
        raise NotImplementedError


class Objective(nn.Module):
    """Student, teacher and terms; ``forward(batch)`` returns the total and the value of each term.

    The student and the trainable parts of terms are submodules. The teacher is not a submodule, so it is not trained,
    saved or wrapped for distributed training. ``autocast`` is the dtype of matrix products, or None for float32. The
    terms always run in float32.
    """

    def __init__(
        self,
        student: Side,
        terms: Sequence[LossTerm],
        *,
        teacher: Side | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.student = student.model
        self.sides = (student, teacher)
        self.terms = tuple(terms)
        self.autocast = autocast
        self.logit_terms = [term for term in terms if isinstance(term, LogitTerm)]
        self.state_terms = [term for term in terms if isinstance(term, StateTerm)]
        self.hidden = any(term.hidden for term in self.state_terms)
        self.numbered = any(term.numbered for term in self.state_terms)
        built = {str(i): term.module(student, teacher or student) for i, term in enumerate(self.state_terms)}
        self.parts = nn.ModuleDict({name: module for name, module in built.items() if module is not None})

    def names(self) -> list[str]:
        """Return a unique name for each term. A repeated type gets its position appended."""
        types = [term.type for term in self.terms]
        return [name if types.count(name) == 1 else f"{name}.{i}" for i, name in enumerate(types)]

    def make_room(self, rows: int, longest: int) -> None:
        """Let the numbered terms allocate storage for the rows of the training data."""
        for i, term in enumerate(self.state_terms):
            if term.numbered:
                term.make_room(self._part(i), rows, longest)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted total (a scalar), and the unweighted mean of each term without gradient."""
        student, teacher = self.sides
        with torch.autocast(student.device.type, self.autocast, enabled=self.autocast is not None):
            seen = self._look(student, batch)
            with torch.no_grad():
                shown = self._look(teacher, batch) if teacher else None
            total: Tensor = torch.zeros((), device=student.device)
            values: dict[int, Tensor] = {}
            if self.logit_terms:
                total, means = token_means(self.logit_terms, seen, shown)
                values |= {id(term): mean for term, mean in zip(self.logit_terms, means, strict=True)}
            with torch.autocast(student.device.type, enabled=False):
                for i, term in enumerate(self.state_terms):
                    value = term.loss(seen, shown, self._part(i))
                    total = total + term.weight * value
                    values[id(term)] = value.detach()
        return total, dict(zip(self.names(), (values[id(term)] for term in self.terms), strict=True))

    def _part(self, index: int) -> nn.Module | None:
        name = str(index)
        return self.parts[name] if name in self.parts else None  # noqa: SIM401  (a ModuleDict has no get)

    def _look(self, side: Side, batch: Batch) -> View:
        wanted = {
            projection.module
            for term in self.state_terms
            for attention in term.attentions(side.family, side.config)
            for projection in (attention.query, attention.key, attention.value)
        }
        with watch(side.model, wanted) as outputs:
            body = run_body(side, batch, hidden=self.hidden)
        hidden = tuple(getattr(body, side.family.final_states)) if self.hidden else ()
        return View(side, batch, body.last_hidden_state, hidden, dict(outputs))


def token_means(terms: Sequence[LogitTerm], student: View, teacher: View | None) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the terms' means over the N positions, and the means [K] without gradient."""
    scored = student.batch["labels"] != IGNORE
    labels_N, states_ND = student.batch["labels"][scored], student.final_BTD[scored]
    shown_ND = teacher.final_BTD[scored] if teacher is not None else None
    dtype = torch.promote_types(states_ND.dtype, torch.float32)
    weights_K = torch.tensor([term.weight for term in terms], dtype=dtype, device=states_ND.device)

    def sums(rows: slice, states: Tensor) -> Tensor:
        logits = logits_of(student.side, states)
        with torch.no_grad():
            target = logits_of(teacher.side, shown_ND[rows]) if teacher is not None and shown_ND is not None else None
        with torch.autocast(logits.device.type, enabled=False):
            return torch.stack([term.per_token(logits, target, labels_N[rows]).sum() for term in terms])

    head = operands(student.side.model.get_submodule(student.side.family.head))
    size = chunk_size(student.side, states_ND.device)
    with head_cast_once(teacher.side) if teacher is not None else nullcontext():
        return chunked_means(sums, size, weights_K, states_ND, head)


@contextmanager
def head_cast_once(side: Side) -> Iterator[None]:
    """Cast a frozen head to autocast's dtype once for the block. Autocast caches casts of trainable weights only."""
    kind = side.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    head = side.model.get_submodule(side.family.head)
    frozen = [each for each in head.parameters() if not each.requires_grad] if dtype and is_product(head) else []
    wide = [parameter.data for parameter in frozen]
    try:
        for parameter in frozen:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in zip(frozen, wide, strict=True):
            parameter.data = data
