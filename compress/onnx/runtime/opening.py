"""Open the graphs and settings of an exported directory; needs only numpy and onnxruntime."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from compress.errors import ModelError
from compress.onnx.names import DECODER_FILE, ENCODER_FILE, MODEL_FILE, SHARED_FILE
from compress.onnx.runtime.sampling import as_tokens

_LOAD_ERRORS = (
    *(ort_errors.Fail, ort_errors.InvalidProtobuf, ort_errors.InvalidGraph),
    *(ort_errors.InvalidArgument, ort_errors.NoSuchFile),
)
_RUN_ERRORS = (RuntimeError, ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.RuntimeException)
_OWN_PLACES = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : |\S+\.(?:cc|h):\d+ \S+ ")
CACHE = "past_key_values."
"""Prefix of the names of caches."""
_INTERFACES = {
    MODEL_FILE: ({"input_ids", "attention_mask", "position_ids"}, "logits"),
    ENCODER_FILE: ({"input_ids", "attention_mask"}, "last_hidden_state"),
    DECODER_FILE: ({"input_ids", "encoder_attention_mask", "encoder_hidden_states"}, "logits"),
}
"""The inputs of each graph besides caches, and its first output."""
_TOKEN = ("pad_token_id", "decoder_start_token_id")
_TOKENS = ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id")


def open_session(path: Path, threads: int | None) -> ort.InferenceSession:
    """Return a session of one graph of an exported directory; ModelError if it cannot be opened or has other inputs."""
    if not path.exists():
        raise ModelError(f"{path}: there is no such file; give a directory that was exported to ONNX")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4  # failures are raised as exceptions too
    if path.name == ENCODER_FILE:  # otherwise its threads spin for 50 ms, which the decoder needs
        options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except _LOAD_ERRORS as error:
        beside = [path.with_name(name) for name in (path.name + "_data", SHARED_FILE)]
        data = "".join(f", with its weights in {file.name}" for file in beside if file.exists())
        raise ModelError(f"{path}{data}: cannot be opened ({reason(error)})") from None
    takes = {each.name for each in session.get_inputs() if not each.name.startswith(CACHE)}
    gives = {each.name for each in session.get_outputs()}
    wanted, output = _INTERFACES[path.name]
    if takes != wanted or output not in gives:
        raise ModelError(
            f"{path}: is not the expected graph: its inputs are {_few(takes)} and its outputs {_few(gives)}; "
            f"expected {_few(wanted)} and {output}"
        )
    return session


def run(session: ort.InferenceSession, binding: ort.IOBinding, length: int) -> None:
    """Run with the bound arrays, for rows of ``length`` tokens in total; ModelError if the graph fails."""
    try:
        session.run_with_iobinding(binding)
    except _RUN_ERRORS as error:
        if "alloc" in str(error):
            raise MemoryError(reason(error)) from None
        raise ModelError(
            f"rows of {length} tokens cannot be computed ({reason(error)}); "
            "config.json may give more positions than the weights have"
        ) from None


def reason(error: Exception) -> str:
    """Return the first line of an onnxruntime message, without the paths of its source files."""
    return _OWN_PLACES.sub("", str(error).splitlines()[0])


def _few(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")


def decoding_settings(path: Path) -> dict[str, Any]:
    """Return the settings that decoding needs; ``generation_config.json`` takes precedence over ``config.json``."""
    generation = path / "generation_config.json"
    settings, given = json_object(path / "config.json"), json_object(generation) if generation.exists() else {}
    contexts = [settings[name] for name in ("n_positions", "max_position_embeddings") if name in settings]
    if not contexts:
        raise ModelError(f"{path / 'config.json'}: does not give the number of positions")
    found = settings | {name: value for name, value in given.items() if value is not None} | {"context": contexts[0]}
    if type(found["context"]) is not int or found["context"] < 1:
        raise ModelError(
            f"{path / 'config.json'}: {found['context']!r} must be the number of positions, a whole number from 1"
        )
    for name in (*_TOKEN, *_TOKENS):
        value = found.get(name)
        several = name in _TOKENS
        if any(type(token) is not int for token in (as_tokens(value) if several else [value] * (value is not None))):
            allowed = "a token id, or several" if several else "one token id"
            raise ModelError(f"{path}: {name} is {value!r} in its settings; allowed: {allowed}")
    return found


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of settings; ModelError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.parent}: cannot read {path.name} ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.parent}: {path.name} does not contain a JSON object")
    return value
