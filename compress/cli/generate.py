"""Generates text with any model directory. An ONNX directory needs neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from compress.errors import ModelError, UserError
from compress.files import changed
from compress.onnx.runtime.sampling import LEAST_TEMPERATURE, as_tokens


@dataclass(frozen=True)
class Request:
    """A prompt and decoding settings. Temperature 0 takes the most likely token, or with beams the most likely text."""

    prompt: str
    max_new_tokens: int
    temperature: float
    seed: int
    num_beams: int = 1


def texts(path: Path, request: Request) -> Iterator[str]:
    """Yield the text that follows the prompt. It comes in pieces if the model can stream it."""
    if not path.is_dir():
        raise ModelError(f"{path}: no such model directory")
    if not request.prompt:
        raise UserError("--prompt is empty; give at least one word")
    if any("\ud800" <= character <= "\udfff" for character in request.prompt):  # an input byte that is not valid UTF-8
        raise UserError("--prompt is not valid UTF-8")
    if request.num_beams > 1 and request.temperature:
        raise UserError(
            f"--num-beams {request.num_beams} uses beam search and --temperature {request.temperature:g} samples; "
            "give only one"
        )
    if 0 < request.temperature < LEAST_TEMPERATURE:
        raise UserError(f"--temperature is {request.temperature:g}; give 0 or at least {LEAST_TEMPERATURE:g}")
    return _exported(path, request) if any(path.glob("*.onnx")) else _torch(path, request)


def _exported(path: Path, request: Request) -> Iterator[str]:
    import numpy as np
    from tokenizers import Tokenizer

    from compress.onnx.runtime import Runtime

    _check_sealed(path)
    if not (path / "tokenizer.json").exists():
        raise ModelError(f"{path}: has no tokenizer.json, so it cannot read a prompt")
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ModelError(f"{path}: cannot read the tokenizer in tokenizer.json ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    runtime = Runtime.open(path)
    ids = np.array([tokenizer.encode(request.prompt).ids])
    _check_room(ids.shape[1], request, runtime.context, responds=runtime.reads_sources)
    ends = _ends(path, tokenizer)
    options: dict[str, Any] = {"max_new_tokens": request.max_new_tokens, "eos_token_id": ends}
    if request.num_beams > 1:
        found = runtime.generate(ids, num_beams=request.num_beams, **options)[0, runtime.given(ids).shape[1] :].tolist()
        yield tokenizer.decode(list(takewhile(lambda token: token not in ends, found)))
        return
    if request.temperature:
        options |= {"do_sample": True, "temperature": request.temperature, "seed": request.seed}
    tokens: list[int] = []
    shown = ""
    for token in takewhile(lambda token: token not in ends, (int(row[0]) for row in runtime.stream(ids, **options))):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # several tokens may share the bytes of a character
            yield text.removeprefix(shown)
            shown = text
    yield tokenizer.decode(tokens).removeprefix(shown)  # the rest, if the text ended inside a character


def _ends(path: Path, tokenizer: Any) -> list[int]:
    """Return the end tokens in either runtime: those of the generation settings, and that of the tokenizer."""
    from compress.onnx.runtime.opening import decoding_settings, json_object

    ends = as_tokens(decoding_settings(path).get("eos_token_id"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        written = json_object(path / name).get("eos_token") if (path / name).exists() else None
        word = written.get("content") if isinstance(written, dict) else written
        if isinstance(word, str):
            own = tokenizer.token_to_id(word)
            return list(dict.fromkeys([*ends, *as_tokens(own)]))
    return ends


def _check_sealed(path: Path) -> None:
    """Raise ModelError if graphs or weights differ from those that the manifest names. Without a manifest, skip it."""
    manifest = path / "artifact.json"
    if not manifest.exists():
        return
    try:
        files = json.loads(manifest.read_bytes())["files"]
        graphs = {name: str(digest) for name, digest in files.items() if name.endswith((".onnx", ".onnx_data"))}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ModelError(f"{manifest}: is not the manifest of an artifact") from None
    if problem := changed(path, graphs):
        raise ModelError(f"{path}: {problem}")


def _torch(path: Path, request: Request) -> Iterator[str]:
    from compress.artifact import adopt
    from compress.generation.settings import Decoding
    from compress.generation.subject import subject_of
    from compress.models import context_of

    artifact = adopt(path)
    tokenizer = artifact.tokenizer()
    if tokenizer is None:
        raise ModelError(f"{path}: has no tokenizer, so it cannot read a prompt")
    prompt = tokenizer(request.prompt)["input_ids"]
    context = context_of(artifact.config())
    _check_room(len(prompt), request, context, responds=artifact.manifest.task == "seq2seq")
    sampling = {"do_sample": True, "temperature": request.temperature} if request.temperature else {"do_sample": False}
    written = {"max_new_tokens": request.max_new_tokens, "num_beams": request.num_beams}
    decoding = Decoding.model_validate(written | sampling)
    tokens = subject_of(artifact, "cpu").generate([prompt], decoding, request.seed)[0]
    yield tokenizer.decode(tokens, skip_special_tokens=True)


def _check_room(prompt: int, request: Request, context: int, *, responds: bool) -> None:
    """A continuation shares the context with its prompt. A response and its source each have their own context."""
    new = request.max_new_tokens
    if not responds and prompt + new > context:
        raise UserError(f"--prompt has {prompt} tokens; with {new} new tokens that exceeds the context of {context}")
    if responds and prompt > context:
        raise UserError(f"--prompt has {prompt} tokens, but the model accepts at most {context}")
    if responds and new > context:
        raise UserError(f"--max-new-tokens is {new}, but the model's responses have at most {context} tokens")
