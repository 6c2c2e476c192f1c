"""Open an artifact: a sealed directory, or a standard transformers directory as the base of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.artifact.manifest import MANIFEST, MASKS, QUANTIZED, Manifest, content_digest, hashes_of
from compress.errors import ModelError
from compress.files import changed, require_whole
from compress.models import family_of
from compress.models.family import ModelFamily
from compress.models.loading import build, load_config, load_stock, load_tokenizer, resolve
from compress.problem import Problem
from compress.schema import fault
from compress.surgery.cut import cut_to_sizes
from compress.surgery.mask_files import holds_scores, read_masks
from compress.surgery.masks import attach
from compress.surgery.quantization import QuantizationSpec, restore


@dataclass(frozen=True)
class Artifact:
    """A model directory and its manifest. For a standard transformers directory the manifest is only in memory."""

    path: Path
    manifest: Manifest

    @property
    def traits(self) -> frozenset[str]:
        """What was done to the model: ``masked``, ``pruned``, ``quantized``, ``onnx``, ``bitsandbytes``.

        ``targets`` is for generated rows without a model.
        """
        return frozenset(self.manifest.traits)

    @property
    def digest(self) -> str:
        """Hash of tensors, codes, masks, graphs, targets and config. Times, paths and metrics are not included."""
        return self.manifest.digest

    def config(self) -> Any:
        """Return the transformers config. A model with non-uniform sizes has that of the original model (root)."""
        return load_config(self.path)

    def family(self) -> ModelFamily:
        """Return the model family, which describes the architecture of this model."""
        return family_of(self.config())

    def tokenizer(self) -> Any:
        """Return the tokenizer, or None for a model that has none and reads token ids."""
        return load_tokenizer(self.path)

    def sizes(self) -> dict[str, int]:
        """Return a dict from axis (prunable dimension, such as ``layer.0.heads``) to the number of units left."""
        return {axis: len(self.manifest.kept.get(axis, range(size))) for axis, size in self.manifest.sizes.items()}

    def stock_shape(self) -> bool:
        """Return whether the transformers class has these sizes when it is built from the config."""
        return self.sizes() == {axis.name: axis.size for axis in self.family().axes(self.config())}

    def model(
        self, *, device: str = "cpu", dequantize: bool = False, quantization: QuantizationSpec | None = None
    ) -> nn.Module:
        """Build the torch model in float32 and evaluation mode; see :func:`compress.load`.

        ``quantization`` replaces the manifest's specification while the codes stay the same, for example to leave the
        inputs of linear layers in float32. It is ignored for a float model.
        """
        if "onnx" in self.traits:
            raise ModelError(f"{self.path}: is an ONNX directory; open it with compress.onnx.runtime.Runtime")
        if "targets" in self.traits:
            raise ModelError(
                f"{self.path}: contains generated targets, not a model; a stage can train on them (targets: NAME)"
            )
        if "bitsandbytes" in self.traits:
            return load_stock(self.path, device=device)
        spec = self.manifest.quantization
        if spec is not None:
            spec = quantization or spec
            model = self._empty()
            restore(model, self.family(), spec, load_file(self.path / QUANTIZED), dequantize=dequantize)
        elif self.stock_shape():
            model = load_stock(self.path)
        else:
            model = self._empty()
            _fill(model, load_file(self.path / "model.safetensors"))
        if "masked" in self.traits:
            masks, family = self.masks(), self.family()
            kinds = {axis.kind for axis in family.axes(model.config) if axis.name in masks}
            attach(model, family, sorted(kinds), values=None if self.scored else masks)
        return model.to(device).eval()

    def masks(self) -> dict[str, Tensor]:
        """Return the values by which ``prune`` ranks units: learned masks, or scores when all masks are 1."""
        return read_masks(self.path / MASKS)

    @property
    def scored(self) -> bool:
        """Whether a masked artifact holds scores of its units. Its masks are then all 1."""
        return "masked" in self.traits and holds_scores(self.path / MASKS)

    def _empty(self) -> nn.Module:
        config = self.config()
        model = build(config)
        if not self.stock_shape():
            cut_to_sizes(model, self.family(), self.sizes())
        return model


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
    for aliases in names.values():
        if not any(alias in state for alias in aliases):
            raise ModelError(f"model.safetensors lacks {aliases[0]}")
    model.load_state_dict(state, strict=False)


def adopt(source: str | Path) -> Artifact:
    """Open a sealed artifact, or a standard transformers directory (or hub id) as the base of a run.

    Raises :class:`ModelError` when the directory is missing, the family is not supported, or the files of a sealed
    artifact have changed since it was sealed.
    """
    path = resolve(source)
    if (path / MANIFEST).exists():
        return _opened(path)
    family_of(load_config(path))
    files = hashes_of(path)
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise ModelError(f"{source}: contains no .safetensors file, and weights are read only from such files")
    for name in weights:
        try:
            require_whole(path / name)
        except ValueError as error:
            raise ModelError(f"{path}: cannot read {name} ({error})") from None
    return _unsealed(path, files)


def adopt_deployed(source: str | Path) -> Artifact:
    """Like :func:`adopt`, but accept a directory with ``.onnx`` files and no manifest as an exported model."""
    path = Path(source)
    if (path / MANIFEST).exists() or not any(path.glob("*.onnx")):
        return adopt(source)
    return _unsealed(path, hashes_of(path), traits=("onnx",))


def _opened(path: Path) -> Artifact:
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{path / MANIFEST}: {Problem(first['loc'], fault(first))}") from None
    if problem := changed(path, manifest.files):
        raise ModelError(f"{path}: {problem}")
    return Artifact(path, manifest)


def _unsealed(path: Path, files: dict[str, str], traits: tuple[str, ...] = ()) -> Artifact:
    config = load_config(path)
    family = family_of(config)
    digest = content_digest(path, files)
    sizes = {axis.name: axis.size for axis in family.axes(config)}
    manifest = Manifest(
        family=family.name, task=family.task, traits=traits, root=digest, sizes=sizes, files=files, digest=digest
    )
    return Artifact(path, manifest)
