"""Artifacts. Each is a stock Hugging Face directory plus ``artifact.json``. It is complete or absent."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.errors import ModelError
from compress.files import changed, publish, require_whole, sha256
from compress.models import family_of
from compress.models.family import ModelFamily
from compress.models.loading import build, load_config, load_stock, load_tokenizer, resolve, save_config
from compress.models.stock_files import copy_settings
from compress.schema import Strict, added
from compress.surgery.cut import compose, cut_to_sizes
from compress.surgery.layers import renumbered
from compress.surgery.mask_files import holds_scores, read_masks, write_masks
from compress.surgery.masks import attach
from compress.surgery.quantization import QuantizationSpec, restore

MANIFEST = "artifact.json"
MASKS = "masks.safetensors"
QUANTIZED = "quantized.safetensors"
TARGETS = "targets.jsonl"
"""Rows of a source and the target that a model generated for it. An artifact with this file holds no model."""
NOTES = ("history.jsonl", "details.json")
"""Optional files in which a stage reports on its run. They are hashed, but are not part of the digest."""


class Step(Strict):
    """One stage in an artifact's lineage: its config, its inputs and its effect."""

    stage: str
    type: str
    version: int
    config: dict[str, Any]
    seed: int
    inputs: dict[str, str]
    packages: dict[str, str]
    seconds: float
    coverage: dict[str, Any] | None = None
    metrics: dict[str, float] = Field(default_factory=dict)


class Manifest(Strict):
    """The content of ``artifact.json``.

    ``layers`` lists which layers of the root base are left in each stack (absent: all). ``sizes`` holds the number of
    units of the root on each axis, and ``kept`` lists which of them are left (absent: all). Axis names in ``sizes`` and
    ``kept`` use the layer numbers of this model, not those of the root.
    """

    format: Literal[1] = 1
    family: str
    task: Literal["causal", "seq2seq"]
    traits: tuple[str, ...] = ()
    root: str
    sizes: dict[str, int]
    kept: dict[str, list[int]] = Field(default_factory=dict)
    layers: dict[str, list[int]] = added({})
    quantization: QuantizationSpec | None = None
    lineage: tuple[Step, ...] = ()
    files: dict[str, str]
    digest: str


@dataclass(frozen=True)
class Artifact:
    """A model directory and its manifest. A stock directory, the base of a run, gets a manifest in memory only."""

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
        """The stock configuration. A model with non-uniform sizes has the configuration of the root base."""
        return load_config(self.path)

    def family(self) -> ModelFamily:
        """The model family, which describes the architecture of this model."""
        return family_of(self.config())

    def tokenizer(self) -> Any:
        """The tokenizer, or None for a model that has none and reads token ids."""
        return load_tokenizer(self.path)

    def sizes(self) -> dict[str, int]:
        """The number of units left on each axis."""
        return {axis: len(self.manifest.kept.get(axis, range(size))) for axis, size in self.manifest.sizes.items()}

    def stock_shape(self) -> bool:
        """Whether the stock class has these sizes when it is built from the config."""
        return self.sizes() == {axis.name: axis.size for axis in self.family().axes(self.config())}

    def model(
        self, *, device: str = "cpu", dequantize: bool = False, quantization: QuantizationSpec | None = None
    ) -> nn.Module:
        """Build the working model in float32 and evaluation mode; see :func:`compress.load`.

        ``quantization`` replaces the manifest's specification while the codes stay the same. An example is float
        inputs of products. It is ignored for a float model.
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
        """The values by which ``prune`` ranks units: learned masks, or scores when all masks are 1."""
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


def adopt(source: str | Path) -> Artifact:
    """Open a sealed artifact, or take a stock directory (or hub id) as the base of a run.

    Raises :class:`ModelError` when the directory is missing, the family is not supported, or the files of a sealed
    artifact have changed since it was sealed.
    """
    path = resolve(source)
    if (path / MANIFEST).exists():
        return _opened(path)
    family_of(load_config(path))
    files = _hashes(path)
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
    return _unsealed(path, _hashes(path), traits=("onnx",))


def _unsealed(path: Path, files: dict[str, str], traits: tuple[str, ...] = ()) -> Artifact:
    config = load_config(path)
    family = family_of(config)
    digest = _digest(path, files)
    sizes = {axis.name: axis.size for axis in family.axes(config)}
    manifest = Manifest(
        family=family.name, task=family.task, traits=traits, root=digest, sizes=sizes, files=files, digest=digest
    )
    return Artifact(path, manifest)


def seal(
    directory: Path,
    final: Path,
    *,
    parent: Artifact,
    traits: Sequence[str],
    step: Step,
    kept: Mapping[str, Sequence[int]],
    layers: Mapping[str, Sequence[int]] | None = None,
    quantization: QuantizationSpec | None = None,
) -> Artifact:
    """Hash every file of ``directory``, write the manifest last, and rename the directory to ``final``.

    ``layers`` lists which layers of the parent stayed, by stack (absent: all). ``kept`` lists units by their numbers in
    the root, under axis names with the layer numbers of the new model.
    """
    files = _hashes(directory)
    manifest = Manifest(
        family=parent.manifest.family,
        task=parent.manifest.task,
        traits=tuple(sorted(traits)),
        root=parent.manifest.root,
        sizes=renumbered(parent.family(), parent.manifest.sizes, layers or {}),
        kept={axis: list(units) for axis, units in kept.items()},
        layers={stack: left.tolist() for stack, left in compose(parent.manifest.layers, layers or {}).items()},
        quantization=quantization,
        lineage=(*parent.manifest.lineage, step),
        files=files,
        digest=_digest(directory, files),
    )
    return _published(directory, final, manifest)


def seal_root(
    directory: Path,
    final: Path,
    *,
    family: ModelFamily,
    traits: Sequence[str],
    sizes: dict[str, int],
    kept: dict[str, list[int]],
    layers: dict[str, list[int]],
    quantization: QuantizationSpec | None,
) -> Artifact:
    """Seal a directory that was not made by a stage. Its own digest is its root."""
    files = _hashes(directory)
    digest = _digest(directory, files)
    manifest = Manifest(
        family=family.name,
        task=family.task,
        traits=tuple(traits),
        root=digest,
        sizes=sizes,
        kept=kept,
        layers=layers,
        quantization=quantization,
        files=files,
        digest=digest,
    )
    return _published(directory, final, manifest)


def _published(directory: Path, final: Path, manifest: Manifest) -> Artifact:
    """Write the manifest last, and rename the directory to ``final``."""
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
    publish(directory, final)
    return Artifact(final, manifest)


def save_model(model: Any, source: Artifact, out: Path) -> None:
    """Write a stock directory: ``config.json``, tokenizer files, and ``model.safetensors`` with shared tensors once."""
    copy_settings(source.path, out)
    save_config(model, out)
    save_file(stock_state(model), out / "model.safetensors", metadata={"format": "pt"})


def save_masks(values: Mapping[str, Tensor], out: Path, *, scores: bool) -> None:
    """Write ``masks.safetensors``: masks by axis, or scores that rank the units of a model whose masks are all 1."""
    write_masks(out / MASKS, values, scores=scores)


def stock_state(model: Any) -> dict[str, Tensor]:
    """The stock state of a model. A shared tensor appears once, under the name that ``from_pretrained`` reads."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    items = sorted(model.state_dict(keep_vars=True).items(), key=lambda item: item[0] in tied)
    for name, tensor in items:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().cpu().contiguous()
    return dict(sorted(state.items()))


def _opened(path: Path) -> Artifact:
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ": ".join(filter(None, [str(path / MANIFEST), ".".join(map(str, first["loc"]))]))
        raise ModelError(f"{where}: {first['msg']}") from None
    if problem := changed(path, manifest.files):
        raise ModelError(f"{path}: {problem}")
    return Artifact(path, manifest)


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
    for aliases in names.values():
        if not any(alias in state for alias in aliases):
            raise ModelError(f"model.safetensors lacks {aliases[0]}")
    model.load_state_dict(state, strict=False)


def _hashes(directory: Path) -> dict[str, str]:
    """Hash the files directly in the directory. Files in subdirectories, such as runs started there, are ignored."""
    return {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.is_file() and path.name != MANIFEST}


def _digest(directory: Path, files: Mapping[str, str]) -> str:
    kinds = (".safetensors", ".onnx", ".onnx_data", TARGETS)
    content = {name: digest for name, digest in files.items() if name.endswith(kinds)}
    config = json.loads((directory / "config.json").read_text())
    for volatile in ("transformers_version", "_name_or_path"):
        config.pop(volatile, None)
    content["config.json"] = json.dumps(config, sort_keys=True)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
