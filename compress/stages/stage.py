"""A stage: a frozen config with one method, from artifact to artifact."""

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
from compress.schema import Strict
from compress.surgery.coverage import Coverage
from compress.surgery.quantization import QuantizationSpec, Scheme


@dataclass(frozen=True)
class Context:
    """What a stage may use besides its source: named artifacts, the data of the run, device and seed."""

    models: Mapping[str, Artifact]
    data: Data | None = None
    device: str = "cpu"
    seed: int = 0
    bar: bool = True

    def trained_on(self, targets: str | None) -> Context:
        """This context with the generated ``targets`` (an artifact's name) in place of those of ``data.train``."""
        if targets is None or self.data is None:
            return self
        data = with_targets(self.data, self.models[targets].path / TARGETS, targets)
        return replace(self, data=data)

    def train(self, name: str) -> Split:
        """The rows to train on; raises DataError, with the stage's ``name``, where there are none."""
        if self.data is None or self.data.train is None:
            raise DataError(f"{name}: trains, but the recipe has no data.train")
        return self.data.train


@dataclass(frozen=True)
class Result:
    """What a stage returns, which the pipeline seals: traits, units, layers, quantization, coverage and metrics."""

    traits: frozenset[str]
    coverage: Coverage
    kept: Mapping[str, list[int]] = field(default_factory=dict)
    layers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The layers of the source that stayed, by stack. An absent stack keeps all. ``kept`` uses new layer numbers."""
    quantization: QuantizationSpec | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


LOAD_ONLY = "opens with compress.load only"
"""The note of a model whose sizes no stock class can express."""


@dataclass(frozen=True)
class Shape:
    """What is known of a stage's input or teacher before any work."""

    name: str
    config: Any
    sizes: Mapping[str, int]
    traits: frozenset[str]
    root: str
    """Name of the model in the recipe that this one descends from; itself for a base."""
    masked: tuple[AxisKind, ...] = ()
    """Kinds of axes that carry masks."""
    scored: bool = False
    """Masked, with units scored and their masks left at 1."""
    layers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """The root's layers that are left, by stack; an absent stack has all."""
    scheme: Scheme | None = None
    """How a quantized model quantizes the inputs of its products; None for others."""

    @property
    def note(self) -> str:
        """A remark on the result that its traits do not make."""
        if self.traits & {"quantized", "onnx", "bitsandbytes", "targets"}:  # no stock class opens these
            return ""
        return "" if family_of(self.config).uniform_config(self.config, self.sizes) else LOAD_ONLY


class Stage(Strict):
    """One step of a recipe. Subclasses add fields and ``run``. A stage holds no state of a run.

    ``run`` writes a model directory into ``out``, a directory that survives an interruption (so checkpoints go to
    ``out/checkpoints``), and never sees the recipe or its neighbours.
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
        """Do the work; the pipeline seals what is in ``out``."""
        raise NotImplementedError

    @classmethod
    def traits_after(cls, source: frozenset[str]) -> frozenset[str]:
        """The traits of the result: those of the source without ``takes``, and ``gives``."""
        return source - cls.takes | cls.gives

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[str]:
        """What is wrong that can be seen without training, each as ``field: what``."""
        return iter(())

    def shape(self, source: Shape) -> Shape:
        """What is known of the result before any work. It is called only if :meth:`problems` finds nothing."""
        return replace(source, name=self.name or self.type, traits=self.traits_after(source.traits))
