"""The keys of results: hashes over everything that determines a result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from compress.artifact import Artifact
from compress.stages.stage import Stage

_ALWAYS = ("torch", "transformers", "accelerate")
_BY_TRAIT = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "bitsandbytes": ("bitsandbytes",)}
_NAMES = {"type", "name", "source", "teacher", "targets"}
_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "generation_config")
"""Files of a model that determine what text it reads and writes, by the start of their names."""


def digest(value: Any) -> str:
    """Return the SHA-256 hash of ``value`` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def key(value: Any) -> str:
    """Return the 12 hexadecimal digits at the end of a result directory's name."""
    return digest(value)[:12]


@cache
def installed(package: str) -> str:
    """Return the version of an installed package, or ``none``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def packages(traits: frozenset[str] = frozenset()) -> dict[str, str]:
    """Versions of the packages that compute a result with these traits."""
    names = [*_ALWAYS, *(name for trait in sorted(traits) for name in _BY_TRAIT.get(trait, ()))]
    return {"compress-lm": compress_version()} | {name: installed(name) for name in names}


def compress_version() -> str:
    """Return this package's own version, installed or not."""
    from compress import __version__

    return __version__


def identity(artifact: Artifact) -> str:
    """Return the hash of a model, of how it computes, of what it was cut from, and of its tokenizer and settings."""
    manifest = artifact.manifest
    beside = {name: sha for name, sha in manifest.files.items() if name.startswith(_TOKENIZER)}
    facts = manifest.model_dump(mode="json", include={"quantization", "kept", "layers"})
    return digest([artifact.digest, beside, facts])


def stage_key(stage: Stage, *, seed: int, inputs: Mapping[str, str]) -> str:
    """Return the key of a stage's result. ``inputs`` are the hashes of source, teacher, targets and data.

    Names that a recipe gives to models and stages are left out, so renaming does not rerun anything.
    """
    config = stage.model_dump(mode="json", exclude=_NAMES)
    return key([stage.type, stage.version, config, seed, dict(inputs), packages(stage.gives)])
