"""A stage: a frozen config with a ``run`` method that makes one artifact from another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from compress.artifact import TARGETS, Artifact
from compress.data import Data, Split
from compress.data.dataset import with_targets
from compress.errors import DataError
from compress.models import family_of
from compress.models.structure import AxisKind
from compress.problem import Problem
from compress.schema import Strict
from compress.surgery.coverage import Coverage
from compress.surgery.quantization import Activations, QuantizationSpec


@dataclass(frozen=True)
class Context:
    """Inputs of a stage besides its source: named artifacts, the data of the run, device and seed."""

    models: Mapping[str, Artifact]
    data: Data | None = None
    device: str = "cpu"
    seed: int = 0
    bar: bool = True

    def trained_on(self, targets: str | None) -> Context:
        """Return this context with the targets of ``data.train`` taken from the artifact named ``targets``."""
        if targets is None or self.data is None:
            return self
        data = with_targets(self.data, self.models[targets].path / TARGETS, targets)
        return replace(self, data=data)

    def train(self, name: str) -> Split:
        """Return the rows to train on. Raises DataError, with the stage's ``name``, if there are none."""
        if self.data is None or self.data.train is None:
            raise DataError(f"{name}: trains, but the recipe has no data.train")
        return self.data.train


@dataclass(frozen=True)
class Result:
    """The facts that a stage returns and the pipeline seals with its files."""

    traits: frozenset[str]
    coverage: Coverage
    kept: Mapping[str, list[int]] = field(default_factory=dict)
    layers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """A dict from stack (encoder or decoder) to the kept layers of the source. A stack that is not in it keeps all.
    ``kept`` uses new layer numbers."""
    quantization: QuantizationSpec | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


LOAD_ONLY = "opens with compress.load only"
"""The note on a model whose sizes no transformers config can express."""


@dataclass(frozen=True)
class Shape:
    """Facts about a stage's input or teacher that are known before any work."""

    name: str
    config: Any
    sizes: Mapping[str, int]
    traits: frozenset[str]
    root: str
    """Name of the recipe's model that this one was made from. For a model of the recipe, its own name."""
    masked: tuple[AxisKind, ...] = ()
    """Kinds of axes (prunable dimensions: ``hidden``, ``heads``, ``groups``, ``ffn``) that have masks."""
    scored: bool = False
    """Whether a masked model has scores of its units and all its masks are 1."""
    layers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """A dict from stack to the layers of the original model (root) that are left. A stack that is not in it has all."""
    activations: Activations | None = None
    """How a quantized model quantizes the inputs of its linear layers. None for a model that is not quantized."""

    @property
    def note(self) -> str:
        """A note on the result that its traits do not express."""
        if self.traits & {"quantized", "onnx", "bitsandbytes", "targets"}:  # transformers cannot open these anyway
            return ""
        return "" if family_of(self.config).uniform_config(self.config, self.sizes) else LOAD_ONLY


class Stage(Strict):
    """One step of a recipe. Subclasses add fields and ``run``. A stage holds no state of a run.

    ``run`` writes a model directory into ``out``. This directory survives an interruption, so checkpoints go to
    ``out/checkpoints``. ``run`` does not see the recipe or other stages.
    """

    type: str
    name: str = ""
    """The name of the result for later stages, teachers and measurements. The default is the stage's type."""
    source: str | None = None
    """The artifact to start from. The default is the result of the stage before, except generated targets."""

    needs: ClassVar[frozenset[str]] = frozenset()
    forbids: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    takes: ClassVar[frozenset[str]] = frozenset()
    """Traits of the source that the result no longer has."""
    trains: ClassVar[bool] = False
    """The stage needs ``data.train``."""
    version: ClassVar[int] = 1

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        """Do the work. The pipeline then seals the content of ``out``."""
        raise NotImplementedError

    @classmethod
    def traits_after(cls, source: frozenset[str]) -> frozenset[str]:
        """Return the traits of the result: those of the source, without ``takes``, plus ``gives``."""
        return source - cls.takes | cls.gives

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[Problem]:
        """Yield problems that can be found without training. Paths start at a field of this stage."""
        return iter(())

    def shape(self, source: Shape) -> Shape:
        """Return the facts about the result that are known before any work. Called only if there are no problems."""
        return replace(source, name=self.name or self.type, traits=self.traits_after(source.traits))
