"""Responses of an exported encoder-decoder model: the text of the stock library and optimum, greedy and with beams."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import ModelError, UserError
from compress.onnx.runtime import Runtime

SOURCES = np.random.default_rng(1).integers(3, 60, (3, 9))
MASK = (np.arange(9) < np.array([9, 4, 7])[:, None]).astype(np.int64)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"forced_bos_token_id": 7, "forced_eos_token_id": 9},
    {"num_beams": 2},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3},
    {"num_beams": 4, "length_penalty": 0.5, "forced_bos_token_id": 7, "forced_eos_token_id": 9, "min_length": 4},
]


@pytest.fixture(params=[0, 1])
def seed(request: pytest.FixtureRequest) -> int:
    """Of a random model."""
    return int(request.param)


@pytest.fixture
def responding(exported: Callable[..., Any], request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A function that exports a random BART or mBART whose logits are far from uniform, with its start token."""

    def make(seed: int, bits: int = 0, *, family: str = "bart", **options: Any) -> Any:
        torch.manual_seed(seed)
        model = request.getfixturevalue(f"tiny_{family}")(**options)
        with torch.no_grad():
            model.final_logits_bias.zero_()
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.dim() > 1 else 1)
        return exported(bits, model=model)

    return make


def likeliest(model: Any) -> list[int]:
    """Tokens in the order in which the model begins its responses with them."""
    with torch.no_grad():
        start = torch.full((3, 1), model.config.decoder_start_token_id)
        logits = model(torch.from_numpy(SOURCES), decoder_input_ids=start).logits
    order: list[int] = logits[:, -1].mean(0).argsort(descending=True).tolist()
    return order


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [{}, {"heads": 3, "hidden": 36, "scale_embedding": True}], ids=["", "copying"])
@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_text_equals_that_of_the_stock_library(
    responding: Callable[..., Any], family: str, seed: int, shape: dict[str, Any], options: dict[str, Any]
) -> None:
    found = responding(seed, family=family, **shape)
    order = likeliest(found.model)
    special = {"eos_token_id": order[2:6], "pad_token_id": order[-1]}
    start = found.model.config.decoder_start_token_id
    (found.directory / "generation_config.json").write_text(json.dumps(special | {"decoder_start_token_id": start}))
    expected = found.model.generate(
        torch.from_numpy(SOURCES), attention_mask=torch.from_numpy(MASK), max_new_tokens=14, do_sample=False,
        **{"forced_eos_token_id": None, **special, **options},
    )  # fmt: skip
    got = Runtime.open(found.directory, threads=1).generate(
        SOURCES, MASK, max_new_tokens=14, **{"forced_eos_token_id": -1, **options}
    )
    assert got.tolist() == expected.tolist()


def test_a_stream_gives_the_tokens_of_the_text(responding: Callable[..., Any], seed: int) -> None:
    runtime = Runtime.open(responding(seed).directory, threads=1)
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": -1}
    streamed = np.stack(list(runtime.stream(SOURCES, MASK, **options)), axis=1)
    assert streamed.tolist() == runtime.generate(SOURCES, MASK, **options)[:, 1:].tolist()


def test_forced_tokens_of_the_directory_count(responding: Callable[..., Any], seed: int) -> None:
    """As in ``generate`` of the stock library, what the directory forces holds unless the caller says otherwise."""
    found = responding(seed)
    file = found.directory / "generation_config.json"
    file.write_text(json.dumps({"decoder_start_token_id": 2, "forced_bos_token_id": 7, "forced_eos_token_id": 9}))
    runtime = Runtime.open(found.directory, threads=1)
    text = runtime.generate(SOURCES, MASK, max_new_tokens=5, eos_token_id=-1)
    assert (text[:, 1] == 7).all()
    assert (text[:, -1] == 9).all()
    free = runtime.generate(
        SOURCES, MASK, max_new_tokens=5, eos_token_id=-1, forced_bos_token_id=-1, forced_eos_token_id=-1
    )
    assert not (free[:, 1] == 7).all()


def test_what_does_not_fit_is_reported(responding: Callable[..., Any]) -> None:
    runtime = Runtime.open(responding(0).directory, threads=1)
    long = np.full((1, runtime.context + 1), 5)
    with pytest.raises(UserError, match=f"{runtime.context + 1} tokens exceed the context of {runtime.context}"):
        runtime.generate(long, max_new_tokens=1)
    with pytest.raises(UserError, match=f"{runtime.context + 1} tokens exceed"):
        runtime.stream(long, max_new_tokens=2)
    with pytest.raises(UserError, match="exceed the context"):
        runtime.generate(SOURCES, max_new_tokens=runtime.context + 1)
    with pytest.raises(
        UserError, match=r"attention_mask: the shape \(3, 8\) differs from the shape \(3, 9\) of input_ids"
    ):
        runtime.generate(SOURCES, MASK[:, 1:])


def test_what_is_not_a_source_is_reported(responding: Callable[..., Any]) -> None:
    runtime = Runtime.open(responding(0).directory, threads=1)
    for ids, mask, message in (
        ([[3, 67]], None, "input_ids: 67 is not a token of the vocabulary, 0 to 66"),
        ([[3.5]], None, "input_ids: float64 is not an integer type"),
        ([[]], None, r"input_ids: the shape must be .*, got \(1, 0\)"),
        ([[1, 2]], [[1]], r"attention_mask: the shape \(1, 1\) differs from the shape \(1, 2\) of input_ids"),
        ([[1, 2]], [[0, 0]], "attention_mask: row 0 masks all its tokens"),
    ):
        for call in (runtime.generate, runtime.stream, runtime.begin, runtime.answer):
            with pytest.raises(UserError, match=message):
                call(ids, mask)
    files = r"\(encoder_model.onnx, decoder_model_merged.onnx\)"
    with pytest.raises(UserError, match=f"logits: this model responds to sources {files}; use answer, or begin"):
        runtime.logits(SOURCES)
    with pytest.raises(UserError, match=f"start: this model responds to sources {files}; use answer, or begin"):
        runtime.start(1)
    assert runtime.generate(SOURCES.tolist(), MASK.tolist()).tolist() == runtime.generate(SOURCES, MASK).tolist()


def test_a_response_ends_with_the_positions(responding: Callable[..., Any]) -> None:
    runtime = Runtime.open(responding(0).directory, threads=1)
    answer = runtime.answer(SOURCES)
    answer.feed(np.full((3, 1), 2))
    with pytest.raises(ValueError, match=f"{runtime.context + 1} tokens do not fit a capacity of {runtime.context}"):
        answer.feed(np.full((3, runtime.context), 5))
    answer.feed(np.full((3, runtime.context - 1), 5))
    with pytest.raises(ValueError, match=f"{runtime.context + 1} tokens do not fit"):
        answer.feed(np.full((3, 1), 5))


@pytest.mark.parametrize("file", ["encoder_model.onnx", "decoder_model_merged.onnx"])
def test_a_damaged_directory_is_reported(responding: Callable[..., Any], file: str) -> None:
    directory = responding(0).directory
    (directory / file).write_bytes(b"")
    with pytest.raises(ModelError, match=f"{file}(, with its weights in shared.onnx_data)?: cannot be opened"):
        Runtime.open(directory)
    (directory / file).unlink()
    with pytest.raises(ModelError, match=f"{file}: there is no such file; give a directory that was exported to ONNX"):
        Runtime.open(directory)


def test_graphs_that_changed_places_and_a_start_that_is_not_a_token_are_reported(
    responding: Callable[..., Any],
) -> None:
    directory = responding(0).directory
    (directory / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 67}))
    with pytest.raises(ModelError, match="decoder_start_token_id 67 is not a token of the vocabulary, 0 to 66"):
        Runtime.open(directory)
    (directory / "encoder_model.onnx").write_bytes((directory / "decoder_model_merged.onnx").read_bytes())
    with pytest.raises(
        ModelError, match=r"encoder_model\.onnx: is not the expected graph: its inputs are encoder_attention_mask"
    ):
        Runtime.open(directory)


def test_without_a_start_token_responses_begin_with_the_end_token(exported: Any, tiny_bart: Callable[..., Any]) -> None:
    model = tiny_bart()
    model.config.decoder_start_token_id = None
    text = Runtime.open(exported(model=model).directory).generate(SOURCES, MASK, max_new_tokens=2)
    assert (text[:, 0] == model.config.eos_token_id).all()


@pytest.mark.slow
@pytest.mark.optimum
@pytest.mark.parametrize(
    ("bits", "options"),
    [
        *((0, {}), (8, {}), (4, {}), (2, {}), (0, {"decoder_layers": 1}), (2, {"layers": 1, "decoder_layers": 3})),
        *((0, {"family": "mbart"}), (4, {"family": "mbart"})),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_beams", [1, 4])
def test_optimum_generates_the_same_text(
    responding: Callable[..., Any], bits: int, options: dict[str, Any], num_beams: int
) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime", exc_type=ImportError)
    found = responding(0, bits, **options)
    model = optimum.ORTModelForSeq2SeqLM.from_pretrained(found.directory)
    chosen: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": likeliest(found.model)[3], "num_beams": num_beams}
    sources = {"input_ids": torch.from_numpy(SOURCES), "attention_mask": torch.from_numpy(MASK)}
    expected = model.generate(**sources, do_sample=False, **chosen)
    got = Runtime.open(found.directory).generate(SOURCES, MASK, **chosen)
    assert got.tolist() == expected.tolist()
    if not bits:
        assert got.tolist() == found.model.generate(**sources, do_sample=False, **chosen).tolist()
