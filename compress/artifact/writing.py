"""Write an artifact: the files of its model, then the manifest, and last the name that makes it complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from compress.artifact.manifest import MANIFEST, MASKS, Manifest, Step, content_digest, hashes_of
from compress.artifact.reading import Artifact
from compress.files import publish
from compress.models.family import ModelFamily
from compress.models.loading import save_config
from compress.models.stock_files import copy_settings
from compress.surgery.cut import compose
from compress.surgery.layers import renumbered
from compress.surgery.mask_files import write_masks
from compress.surgery.quantization import QuantizationSpec


def save_model(model: Any, source: Artifact, out: Path) -> None:
    """Write a standard transformers directory: ``config.json``, tokenizer files, and ``model.safetensors``.

    ``model.safetensors`` contains shared tensors once.
    """
    copy_settings(source.path, out)
    save_config(model, out)
    save_file(stock_state(model), out / "model.safetensors", metadata={"format": "pt"})


def stock_state(model: Any) -> dict[str, Tensor]:
    """Return the state of a model under the tensor names of transformers. A shared tensor appears once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    items = sorted(model.state_dict(keep_vars=True).items(), key=lambda item: item[0] in tied)
    for name, tensor in items:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().cpu().contiguous()
    return dict(sorted(state.items()))


def save_masks(values: Mapping[str, Tensor], out: Path, *, scores: bool) -> None:
    """Write ``masks.safetensors`` from a dict of axis name to masks, or to scores if all masks of the model are 1."""
    write_masks(out / MASKS, values, scores=scores)


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

    A directory with that name is replaced. A run gives each result its own name, so it can only be an unfinished one.
    ``layers`` is a dict from stack (encoder or decoder) to the layers of the parent that are left; a stack that is not
    in it keeps all. ``kept`` is a dict from axis name, with the layer numbers of the new model, to unit numbers in the
    original model (root).
    """
    files = hashes_of(directory)
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
        digest=content_digest(directory, files),
    )
    return _published(directory, final, manifest, replace=True)


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
    """Seal a directory that no stage made. It is an original model (root), so ``root`` is its own digest.

    Raises OSError if ``final`` is a directory with content.
    """
    files = hashes_of(directory)
    digest = content_digest(directory, files)
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


def _published(directory: Path, final: Path, manifest: Manifest, *, replace: bool = False) -> Artifact:
    """Write the manifest last, and rename the directory to ``final``."""
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
    publish(directory, final, replace=replace)
    return Artifact(final, manifest)
