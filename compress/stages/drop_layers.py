"""Remove whole layers. The result has the same width and fewer layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, StrictInt

from compress.artifact import Artifact, save_masks, save_model
from compress.errors import ModelError
from compress.models import family_of
from compress.models.structure import LayerStack, sized_axes
from compress.problem import Problem
from compress.stages.stage import LOAD_ONLY, Context, Result, Shape, Stage
from compress.surgery.cut import compose
from compress.surgery.layers import Layers, chosen, drop, renumbered, shallower
from compress.surgery.masks import detach

Kept = StrictInt | tuple[StrictInt, ...]


def _readable(value: Any) -> Any:
    parts = list(value.values()) if isinstance(value, Mapping) else [value]
    if wrong := [part for part in parts or [value] if not _is_kept(part)]:
        given = (
            f"{wrong[0]} is not allowed; " if isinstance(value, Mapping) else ""
        )  # pydantic reports other values itself
        raise ValueError(
            f"{given}write a number of layers from 1, or an ascending list of layers from 0, such as [0, 2, 5]"
        )
    return value


def _is_kept(value: Any) -> bool:
    if not isinstance(value, list | tuple):
        return type(value) is int and value >= 1
    whole = all(type(layer) is int for layer in value)
    return bool(value) and whole and value[0] >= 0 and all(a < b for a, b in pairwise(value))


class DropLayers(Stage):
    """Keep some layers of each stack (encoder or decoder) and permanently remove the others. DQ-BART (Li et al. 2022)
    makes its initial students this way.

    ``keep`` is a number of layers, a list of layer numbers from 0, or a mapping from stacks to either of these
    (``{encoder: 3, decoder: [5]}``). Without a mapping it applies to every stack. A stack that the mapping does not
    name keeps all its layers.

    If ``keep`` is a number and the stack has six layers, DQ-BART's choice applies: 1: 5; 2: 0, 5; 3: 0, 2, 5;
    4: 0, 2, 3, 5; 5: 0, 1, 3, 4, 5. In a stack with another number of layers the kept ones are evenly spaced from the
    first to the last, halves rounded down. A single kept layer is the last one.

    Layer numbers refer to the layers that the source has now. The result numbers its layers from 0 again. Kept layers
    keep their masks.
    """

    type: Literal["drop_layers"] = "drop_layers"
    keep: Annotated[dict[str, Kept] | Kept, BeforeValidator(_readable)]

    forbids: ClassVar[frozenset[str]] = frozenset({"quantized", "onnx", "bitsandbytes"})

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        family = source.family()
        keep = self._layers(source.config())
        model = source.model()
        masks = source.masks() if "masked" in source.traits else None
        if masks is not None:
            detach(model)
        coverage = drop(model, family, keep)
        coverage.require(f"{self.name or self.type}: keep {self.keep}")
        coverage = coverage.model_copy(update={"note": _note(source, keep)})
        if family.uniform_config(model.config, {axis.name: axis.size for axis in sized_axes(model, family)}) is None:
            coverage = coverage.model_copy(update={"note": f"{coverage.note}; {LOAD_ONLY}"})
        save_model(model, source, out)
        if masks is not None:
            save_masks(renumbered(family, masks, keep), out, scores=source.scored)
        return Result(
            traits=self.traits_after(source.traits),
            coverage=coverage,
            kept=renumbered(family, source.manifest.kept, keep),
            layers=keep,
        )

    def problems(self, source: Shape, teacher: Shape | None) -> Iterator[Problem]:
        try:
            if not self._layers(source.config):
                depths = (
                    f"the {stack.name}'s {stack.depth(source.config)}" for stack in family_of(source.config).stacks
                )
                yield Problem(("keep",), f"every layer would stay; allowed: fewer than {' or '.join(depths)}")
        except ModelError as error:
            yield error.problem

    def shape(self, source: Shape) -> Shape:
        family, keep = family_of(source.config), self._layers(source.config)
        return replace(
            super().shape(source),
            config=shallower(source.config, family, keep),
            sizes=renumbered(family, source.sizes, keep),
            layers={stack: left.tolist() for stack, left in compose(source.layers, keep).items()},
        )

    def _layers(self, config: Any) -> Layers:
        """Return a dict from each stack that loses layers to the kept ones. Raises ModelError for unknown layers."""
        stacks = {stack.name: stack for stack in family_of(config).stacks}
        named = self.keep if isinstance(self.keep, dict) else dict.fromkeys(stacks, self.keep)
        if unknown := sorted(set(named) - set(stacks)):
            text = f"this model has no such layers; allowed: {', '.join(stacks)}"
            raise ModelError(Problem(("keep", unknown[0]), text))
        found = {name: self._of(stacks[name], stacks[name].depth(config), kept) for name, kept in named.items()}
        return {name: layers for name, layers in found.items() if len(layers) < stacks[name].depth(config)}

    def _of(self, stack: LayerStack, depth: int, kept: int | Sequence[int]) -> Sequence[int]:
        at = ("keep", stack.name) if isinstance(self.keep, dict) else ("keep",)
        if isinstance(kept, int):
            if kept > depth:
                text = f"{kept} layers, but the {stack.name} has {depth}; allowed: 1 to {depth}"
                raise ModelError(Problem(at, text))
            return chosen(kept, depth)
        if kept[-1] >= depth:
            text = f"layer {kept[-1]}, but the {stack.name} has {depth}; allowed: 0 to {depth - 1}"
            raise ModelError(Problem(at, text))
        return list(kept)


def _note(source: Artifact, keep: Layers) -> str:
    depths = {stack.name: stack.depth(source.config()) for stack in source.family().stacks}
    return "; ".join(f"{name} {', '.join(map(str, left))} of {depths[name]}" for name, left in keep.items())
