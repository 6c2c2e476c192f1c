"""Build or load transformers models from a config or a directory, always in float32 and from safetensors only."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
)

from compress.errors import ModelError
from compress.models import family_of
from compress.models.stock_files import forget_paths
from compress.problem import Problem

_CLASSES = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}


def build(config: Any) -> nn.Module:
    """Return a freshly initialised transformers model in eval mode. Under ``torch.device("meta")`` it needs no memory.

    Raises ModelError for settings that transformers refuses, such as a hidden size that the heads do not divide.
    """
    stock = _CLASSES[family_of(config).task]
    try:
        model: nn.Module = stock.from_config(config, dtype=torch.float32, **_attention(config))
    except (ValueError, TypeError, RuntimeError, KeyError, ArithmeticError) as error:
        text = f"cannot build a {config.model_type} model from it ({_first_line(error)})"
        raise ModelError(Problem(("config",), text)) from error
    _separate_tables(model, set())
    return model.eval()


def load_config(source: str | Path) -> Any:
    """Return the transformers config of a directory, or of a hub id if no such directory exists."""
    try:
        settings, _ = PretrainedConfig.get_config_dict(source, local_files_only=_is_local(source))
        if "model_type" not in settings:  # otherwise transformers guesses it from the directory's name
            raise ValueError("it has no model_type")
        return AutoConfig.from_pretrained(source, local_files_only=_is_local(source))
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"{source}: cannot read config.json ({_first_line(error)})") from error


def load_stock(source: str | Path, *, device: str | None = None) -> nn.Module:
    """Load the model of a directory (or a hub id) in eval mode. Missing or misshapen tensors raise ModelError.

    ``device`` places the modules while they load, which bitsandbytes requires. Without it, the model is on the CPU.
    """
    config = load_config(source)
    stock = _CLASSES[family_of(config).task]
    try:
        model, report = stock.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=_is_local(source),
            output_loading_info=True,
            device_map=device and {"": device},
            **_attention(config),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{source}: cannot read model.safetensors ({_first_line(error)})") from error
    except (TypeError, AttributeError) as error:
        raise ModelError(
            f"{source}: cannot be loaded, because one of its JSON files is invalid ({_first_line(error)})"
        ) from error
    if missing := _separate_tables(model, set(report["missing_keys"])):
        raise ModelError(f"{source}: model.safetensors lacks {', '.join(sorted(missing)[:3])}")
    loaded: nn.Module = model
    return loaded.eval()


def read_generation_settings(model: Any, source: str | Path) -> None:
    """Give a model that was built from a config alone the generation settings of its directory, if it has some.

    Raises ModelError for a ``generation_config.json`` that cannot be read.
    """
    if not (Path(source) / "generation_config.json").exists():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{source}: no readable generation_config.json ({_first_line(error)})") from error


def _separate_tables(model: Any, missing: set[str]) -> set[str]:
    """Give each embedding of an untied model its own table, and return the names that are still missing.

    Version 4 of transformers builds them as one parameter, saves it under the first name, and fills the others
    with random numbers when it loads. Version 5 keeps them separate. This function does the same for both.
    """
    first, *others = family_of(model.config).embeddings
    if model.config.tie_word_embeddings or f"{first}.weight" in missing:
        return missing
    table = model.get_submodule(first).weight
    for name in others:
        site = model.get_submodule(name)
        if site.weight is table or f"{name}.weight" in missing:
            site.weight = nn.Parameter(table.detach().clone())
    return missing - {f"{name}.weight" for name in others}


def save_config(model: Any, out: Path) -> None:
    """Write ``config.json``, and ``generation_config.json`` if ``out`` has none.

    Older directories keep generation settings in ``config.json``. Loading has copied them to the model's generation
    config, and transformers warns of them or drops them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some non-default generation parameters", category=UserWarning)
        model.config.save_pretrained(out)
    beside = out / "generation_config.json"
    if not beside.exists():
        model.generation_config.to_json_file(beside)


def save_tokenizer(tokenizer: Any, out: Path) -> None:
    """Write the files of a tokenizer, without the paths it was loaded from.

    Raises ModelError for a tokenizer without a fast version, because deployment reads only ``tokenizer.json``.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"tokenizer: {type(tokenizer).__name__} has no fast version, but deployment reads tokenizer.json; "
            "give the fast tokenizer of the model"
        )
    tokenizer.save_pretrained(out)
    forget_paths(out / "tokenizer_config.json")
    if not (out / "tokenizer.json").exists():
        tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))


def resolve(source: str | Path) -> Path:
    """Return the directory of a model: the path itself if it exists, otherwise the snapshot of a hub id."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source}: is not a local directory and could not be fetched from the hub ({_first_line(error)})"
        ) from error


def load_tokenizer(source: str | Path) -> Any:
    """Return the fast tokenizer of a directory, or None if it has none, as for a model over rows of token ids."""
    if not any((Path(source) / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ModelError(f"{source}: cannot read the tokenizer ({_first_line(error)})") from error


def _attention(config: Any) -> dict[str, str]:
    """Choose eager attention where fused attention in version 4 of transformers ignores the config's scaling."""
    return {} if family_of(config).usual_scores(config) else {"attn_implementation": "eager"}


def _is_local(source: str | Path) -> bool:
    return isinstance(source, Path) or Path(source).exists()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
