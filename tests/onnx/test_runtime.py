"""Decoding with numpy and onnxruntime alone: the same text as torch, in batches, through either kind of cache."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from compress.errors import ModelError, UserError
from compress.models import family_of
from compress.onnx.export.exporter import write_graphs
from compress.onnx.runtime import Runtime
from compress.onnx.runtime.session import Decoding
from compress.surgery.cut import cut

IN_PLACE, GROWING = {"heads": 4, "hidden": 32}, {"heads": 5, "hidden": 60}
SHAPES: list[dict[str, Any]] = [
    IN_PLACE,
    GROWING,
    {"family": "llama", "kv_heads": 2},
    {"family": "llama", "kv_heads": 2, "head_dim": 6, "tie": True},
]
"""GPT-2 and Llama with caches that are filled in place, and with caches that grow."""
LLAMAS: list[dict[str, Any]] = [
    {"family": "llama", "kv_heads": 4, "tie": True},
    {"family": "llama", "kv_heads": 1, "bias": True},
    {"family": "llama", "kv_heads": 2, "head_dim": 16},
    {"family": "llama", "kv_heads": 4, "head_dim": 12, "bias": True},
]


def left_padded(rows: int, length: int, vocabulary: int = 67) -> tuple[Any, Any]:
    ids = np.random.default_rng(1).integers(1, vocabulary, (rows, length))
    mask = (np.arange(length) >= np.arange(rows)[:, None]).astype(np.int64)
    return ids, mask


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES + LLAMAS, ids=str)
def test_greedy_text_equals_torch(exported: Callable[..., Any], shape: dict[str, int]) -> None:
    found = exported(**shape)
    ids, mask = left_padded(3, 7)
    with torch.no_grad():
        expected = found.model.generate(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=20, do_sample=False,
            eos_token_id=5, pad_token_id=0,
        )  # fmt: skip
    runtime = Runtime.open(found.directory, threads=1)
    got = runtime.generate(ids, mask, max_new_tokens=20, eos_token_id=5)
    got[:, 7:][np.cumsum(np.cumsum(got[:, 7:] == 5, axis=1), axis=1) > 1] = 0  # ours pads with the end token
    assert got.tolist() == expected.tolist()


STOCK_OPTIONS: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 4, "length_penalty": 0.0, "early_stopping": True, "no_repeat_ngram_size": 2},
    {"num_beams": 5, "length_penalty": 2.0, "early_stopping": "never", "min_new_tokens": 6, "forced_eos_token_id": 9},
    {"num_beams": 4, "length_penalty": -1.0, "no_repeat_ngram_size": 3, "min_length": 11},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 9, "forced_eos_token_id": 9},  # greedy
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES + LLAMAS, ids=str)
@pytest.mark.parametrize("seed", range(1, 4))
def test_text_equals_that_of_the_stock_library(exported: Callable[..., Any], shape: dict[str, int], seed: int) -> None:
    found = exported(**shape, vocab=60 + 13 * seed, seed=seed)
    ids, mask = left_padded(3, 7, 60)
    with torch.no_grad():
        likely = found.model(torch.from_numpy(ids)).logits[:, -1].mean(0).argsort(descending=True)
    special = {"eos_token_id": likely[3:6].tolist(), "pad_token_id": int(likely[-1])}
    (found.directory / "generation_config.json").write_text(json.dumps(special))
    runtime = Runtime.open(found.directory, threads=1)
    widths = set()
    for options in STOCK_OPTIONS:
        expected = found.model.generate(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=18, do_sample=False,
            **special, **options,
        )  # fmt: skip
        got = runtime.generate(ids, mask, max_new_tokens=18, **options)
        assert got.tolist() == expected.tolist(), options
        widths |= set((got != special["pad_token_id"]).sum(1).tolist())
    assert len(widths) > 3  # texts that end early and late


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [8, 6])
@pytest.mark.parametrize("beams", [1, 4])
def test_text_of_a_pruned_llama_equals_that_of_the_stock_library(
    exported: Callable[..., Any], tiny_llama: Callable[..., Any], head_dim: int, beams: int
) -> None:
    """Layers with other numbers of heads, of key/value heads, and of channels."""
    model = tiny_llama(head_dim=head_dim)
    keep = {
        "layer.0.groups": [1],
        "layer.0.heads": [2, 3],
        "layer.1.heads": [0, 3],
        "layer.1.ffn": list(range(0, 48, 3)),
        "hidden": list(range(2, 30)),
    }
    cut(model, family_of(model.config), {axis: torch.tensor(units) for axis, units in keep.items()})
    found = exported(model=model)
    shapes = {each.name: each.shape[1] for each in Runtime.open(found.directory)._sessions["model.onnx"].get_inputs()}
    assert [shapes[f"past_key_values.{layer}.key"] for layer in (0, 1)] == [1, 2]
    ids, mask = left_padded(3, 7)
    special = {"eos_token_id": 5, "pad_token_id": 5}
    with torch.no_grad():
        expected = model.generate(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=20, do_sample=False,
            num_beams=beams, **special,
        )  # fmt: skip
    runtime = Runtime.open(found.directory, threads=1)
    got = runtime.generate(ids, mask, max_new_tokens=20, num_beams=beams, eos_token_id=5)
    ended = np.cumsum(np.cumsum(got[:, 7:] == 5, axis=1), axis=1) > 1
    got[:, 7:][ended] = 5
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_rows_chosen_anew_go_on_with_their_own_past(
    exported: Callable[..., Any], shape: dict[str, int], seed: int
) -> None:
    runtime = Runtime.open(exported(**shape).directory, threads=1)
    generator = np.random.default_rng(seed)
    tokens, mask = left_padded(2, 4)
    decoding = runtime.start(2, 40)
    logits = decoding.feed(tokens, mask)
    for _ in range(12):
        np.testing.assert_allclose(logits[:, -1], runtime.logits(tokens, mask)[:, -1], atol=1e-5)
        for _ in range(generator.integers(3)):
            rows = generator.integers(0, len(tokens), generator.integers(1, 6))
            decoding.reorder(rows)
            tokens, mask = tokens[rows], mask[rows]
        new = generator.integers(0, 67, (len(tokens), generator.integers(1, 3)))
        logits = decoding.feed(new)
        tokens, mask = (np.concatenate(pair, axis=1) for pair in ((tokens, new), (mask, np.ones_like(new))))


def test_a_copied_row_shares_the_prompt(exported: Callable[..., Any]) -> None:
    """After rows parted, only what was written since is copied: the prompt's keys and values stay where they are."""
    runtime = Runtime.open(exported(**IN_PLACE).directory, threads=1)
    decoding = runtime.start(1, 12)
    decoding.feed(np.array([[3, 4, 5, 6]]))
    decoding.reorder(np.array([0, 0, 0]))
    decoding.feed(np.array([[7], [8], [9]]))
    buffers = [buffer for _, _, buffer in decoding._cache._buffers]
    for row in range(3):
        for buffer in buffers:
            buffer[row, :, :4] = row  # so that a copy of it would show
    decoding.reorder(np.array([2, 1, 1]))
    assert all((buffer[row, :, :4] == row).all() for buffer in buffers for row in range(3))
    assert all((buffer[2, :, 4] == buffer[1, :, 4]).all() for buffer in buffers)


def test_beams_do_not_stream_and_forced_tokens_are_known(exported: Callable[..., Any]) -> None:
    runtime = Runtime.open(exported().directory, threads=1)
    ids, _ = left_padded(1, 3)
    with pytest.raises(
        UserError, match="num_beams: beam search with 4 beams has its tokens only at the end; use num_beams 1 to stream"
    ):
        runtime.stream(ids, num_beams=4)
    with pytest.raises(UserError, match="max_length: is not an option of generation; allowed: max_new_tokens, "):
        runtime.generate(ids, max_length=3)
    with pytest.raises(UserError, match="forced_eos_token_id: 67 is not a token of the vocabulary, 0 to 66"):
        runtime.generate(ids, forced_eos_token_id=67)
    with pytest.raises(UserError, match="3 tokens of prompt and 62 new ones exceed the context of 64"):
        runtime.generate(ids, max_new_tokens=62, num_beams=2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 3, 1, 1), (2, 7)])
def test_pieces_give_the_logits_of_the_whole(
    exported: Callable[..., Any], shape: dict[str, int], pieces: tuple[int, ...]
) -> None:
    runtime = Runtime.open(exported(**shape).directory, threads=1)
    ids, mask = left_padded(2, 9)
    whole = runtime.logits(ids, mask)
    decoding = runtime.start(2)
    ends = np.cumsum(pieces)
    parts = [
        decoding.feed(ids[:, end - size : end], mask[:, end - size : end]).copy()
        for end, size in zip(ends, pieces, strict=True)
    ]
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[mask == 1], whole[mask == 1], atol=1e-5)


def test_padding_on_the_right_is_hidden_too(exported: Callable[..., Any]) -> None:
    runtime = Runtime.open(exported().directory, threads=1)
    ids, _ = left_padded(1, 6)
    mask = np.array([[1, 1, 1, 1, 0, 0]])
    np.testing.assert_allclose(runtime.logits(ids, mask)[:, :4], runtime.logits(ids[:, :4]), atol=1e-5)


def test_a_row_that_ended_is_padded_and_the_batch_stops_early(exported: Callable[..., Any]) -> None:
    found = exported()
    runtime = Runtime.open(found.directory, threads=1)
    ids, mask = left_padded(2, 5)
    free = runtime.generate(ids, mask, max_new_tokens=12, eos_token_id=-1)
    assert free.shape == (2, 17)
    first = int(free[0, 5])
    ended = runtime.generate(ids[:1], mask[:1], max_new_tokens=12, eos_token_id=first)
    assert ended.tolist() == [[*ids[0].tolist(), first]]
    both = runtime.generate(ids, mask, max_new_tokens=12, eos_token_id=first)
    assert (both[0, 5:] == first).all()


def test_sampling_is_seeded(exported: Callable[..., Any]) -> None:
    runtime = Runtime.open(exported().directory, threads=1)
    ids, mask = left_padded(2, 5)
    options = {"max_new_tokens": 16, "do_sample": True, "temperature": 2.0, "top_k": 40, "top_p": 0.95}
    one = runtime.generate(ids, mask, seed=1, **options)
    assert one.tolist() == runtime.generate(ids, mask, seed=1, **options).tolist()
    assert one.tolist() != runtime.generate(ids, mask, seed=2, **options).tolist()


def test_streaming_yields_what_generate_returns(exported: Callable[..., Any]) -> None:
    runtime = Runtime.open(exported().directory, threads=1)
    ids, mask = left_padded(2, 5)
    streamed = np.stack(list(runtime.stream(ids, mask, max_new_tokens=6)), axis=1)
    assert streamed.tolist() == runtime.generate(ids, mask, max_new_tokens=6)[:, 5:].tolist()


def test_the_context_is_a_limit(exported: Callable[..., Any]) -> None:
    runtime = Runtime.open(exported(positions=16).directory, threads=1)
    ids, _ = left_padded(1, 10)
    assert runtime.generate(ids, max_new_tokens=6, eos_token_id=-1).shape == (1, 16)
    with pytest.raises(UserError, match="10 tokens of prompt and 7 new ones exceed the context of 16"):
        runtime.generate(ids, max_new_tokens=7)
    with pytest.raises(UserError, match="17 tokens exceed the context of 16"):
        runtime.logits(np.ones((1, 17), np.int64))
    with pytest.raises(ValueError, match="5 tokens do not fit a capacity of 4"):
        runtime.start(1, 4).feed(np.ones((1, 5), np.int64))


def test_prompts_that_cannot_be_continued_are_refused(exported: Callable[..., Any]) -> None:
    runtime = Runtime.open(exported().directory, threads=1)
    with pytest.raises(UserError, match="ends in padding; pad on the left"):
        runtime.generate(np.ones((2, 3), np.int64), np.array([[1, 1, 1], [1, 1, 0]]))
    for shape in ((1, 0), (3,)):
        with pytest.raises(UserError, match="must be \\[rows, tokens\\] with at least one of each"):
            runtime.generate(np.ones(shape, np.int64))


WRONG: list[tuple[Any, Any, str]] = [
    ([[3, -1]], None, "input_ids: -1 is not a token of the vocabulary, 0 to 66"),
    (np.array([[3, 67]]), None, "input_ids: 67 is not a token of the vocabulary, 0 to 66"),
    (np.array([[3, 67]], np.uint8), [[0, 1]], "input_ids: 67 is not a token"),
    (np.ones((1, 3)), None, "input_ids: float64 is not an integer type; give token ids from 0 to 66"),
    ([["a"]], None, "input_ids: <U1 is not an integer type"),
    ([[2**70]], None, "input_ids: object is not an integer type"),
    ([[1, 2], [3]], None, "input_ids: the rows differ in length; pad them, and set attention_mask to 0 at the padding"),
    ([1, 2], None, "input_ids: the shape must be [rows, tokens] with at least one of each, got (2,)"),
    (np.ones(3, np.int64), None, "input_ids: the shape must be [rows, tokens] with at least one of each, got (3,)"),
    ([], None, "input_ids: the shape must be [rows, tokens] with at least one of each, got (0,)"),
    (np.ones((0, 3), int), None, "input_ids: the shape must be [rows, tokens] with at least one of each, got (0, 3)"),
    (np.ones((2, 0), int), None, "input_ids: the shape must be [rows, tokens] with at least one of each, got (2, 0)"),
    ([[1, 2]], [[1]], "attention_mask: the shape (1, 1) differs from the shape (1, 2) of input_ids"),
    ([[1, 2]], [1, 1], "attention_mask: the shape (2,) differs from the shape (1, 2) of input_ids"),
    ([[1, 2]], [[2, 1]], "attention_mask: contains values other than 0 (padding) and 1"),
    ([[1, 2]], [[np.nan, 1]], "attention_mask: contains values other than 0 (padding) and 1"),
    ([[1, 2], [1, 2]], [[0, 1], [0, 0]], "attention_mask: row 1 masks all its tokens"),
    ([[1, 2]], [[0, 1], [1]], "attention_mask: the rows differ in length"),
]
"""Tokens and masks that no model of 67 tokens takes, and what is said."""


def test_what_is_not_a_prompt_is_reported(exported: Callable[..., Any]) -> None:
    runtime = Runtime.open(exported().directory, threads=1)
    for ids, mask, message in WRONG:
        for call in (runtime.generate, runtime.stream, runtime.begin, runtime.logits):
            with pytest.raises(UserError, match=re.escape(message)):
                call(ids, mask)


def test_lists_are_read_as_arrays(exported: Callable[..., Any]) -> None:
    runtime = Runtime.open(exported().directory, threads=1)
    ids, mask = left_padded(2, 5)
    rows, real = ids.tolist(), mask.astype(bool).tolist()
    assert runtime.generate(rows, real).tolist() == runtime.generate(ids, mask).tolist()
    assert runtime.generate(rows, real, num_beams=2).tolist() == runtime.generate(ids, mask, num_beams=2).tolist()
    np.testing.assert_array_equal(runtime.logits(rows, real), runtime.logits(ids.astype(np.int32), mask * 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("hidden", [-100, 67, 2**40])
def test_what_the_mask_hides_may_be_any_number(
    exported: Callable[..., Any], shape: dict[str, int], hidden: int
) -> None:
    runtime = Runtime.open(exported(**shape).directory, threads=1)
    ids, mask = left_padded(2, 5)
    marked = np.where(mask == 1, ids, hidden)
    assert (marked == hidden).any()
    for options in ({}, {"num_beams": 2}, {"no_repeat_ngram_size": 1}):
        found, expected = (runtime.generate(each, mask, **options) for each in (marked, np.where(mask, ids, 0)))
        assert found.tolist() == expected.tolist()


def test_decoding_by_hand_has_limits(exported: Callable[..., Any]) -> None:
    runtime = Runtime.open(exported(positions=16).directory, threads=1)
    for batch in (0, -1, 1.5):
        with pytest.raises(UserError, match=f"batch: {batch} is not a whole number of at least 1"):
            runtime.start(batch)
    for capacity in (0, 17, 2.5):
        with pytest.raises(UserError, match=f"capacity: {capacity} is not a whole number from 1 to the context of 16"):
            runtime.start(1, capacity)
    for longest in (1, 17):
        with pytest.raises(UserError, match=f"longest: {longest} is out of range; it must be at least the number"):
            runtime.begin([[1, 2]], longest=longest)
    with pytest.raises(ValueError, match=r"attention_mask must have the shape \(1, 2\) of input_ids, got \(1,\)"):
        runtime.start(1).feed(np.ones((1, 2), np.int64), np.ones(1))
    with pytest.raises(UserError, match=r"answer: this model continues prompts \(model.onnx\); use start or logits"):
        runtime.answer([[1, 2]])


def test_what_cannot_be_opened_is_named(tmp_path: Path, exported: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match=r"model\.onnx: there is no such file"):
        Runtime.open(tmp_path / "nothing")
    found = exported().directory
    (found / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        Runtime.open(found)
    (found / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json does not contain a JSON object"):
        Runtime.open(found)
    (found / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not give the number of positions"):
        Runtime.open(found)
    (found / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ModelError, match=r"model\.onnx: cannot be opened"):
        Runtime.open(found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_positions": "x"}, r"config\.json: 'x' must be the number of positions"),
        ({"n_positions": 0}, r"config\.json: 0 must be the number of positions"),
        ({"n_positions": []}, r"config\.json: \[\] must be the number of positions"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x' in its settings; allowed: a token id, or several"),
        ({"eos_token_id": 1.5}, r"eos_token_id is 1\.5 in its settings"),
        (
            {"forced_eos_token_id": [1, 2.5]},
            r"forced_eos_token_id is \[1, 2\.5\] in its settings; allowed: a token id, or several",
        ),
        ({"pad_token_id": "q"}, "pad_token_id is 'q' in its settings; allowed: one token id"),
        ({"pad_token_id": [1]}, r"pad_token_id is \[1\] in its settings; allowed: one token id"),
        ({"decoder_start_token_id": [2]}, r"decoder_start_token_id is \[2\] in its settings; allowed: one token id"),
    ],
)
def test_settings_that_are_none_are_reported(
    exported: Callable[..., Any], settings: dict[str, Any], message: str
) -> None:
    found = exported().directory
    config = json.loads((found / "config.json").read_text())
    (found / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ModelError, match=message):
        Runtime.open(found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_positions_that_the_weights_do_not_have_are_reported(
    exported: Callable[..., Any], shape: dict[str, int], capfd: pytest.CaptureFixture[str]
) -> None:
    found = exported(**shape, positions=16).directory
    config = json.loads((found / "config.json").read_text())
    (found / "config.json").write_text(json.dumps(config | {"n_positions": 64}))
    runtime = Runtime.open(found, threads=1)
    message = "^rows of 17 tokens cannot be computed .*; config.json may give more positions than the weights have$"
    with pytest.raises(ModelError, match=message):
        runtime.generate([[1] * 10], max_new_tokens=20, eos_token_id=-1)
    with pytest.raises(ModelError, match=message):
        runtime.logits([[1] * 17])
    assert capfd.readouterr() == ("", "")


def test_damaged_weights_beside_a_graph_are_named(
    exported: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    found = exported()
    write_graphs(found.model, found.directory, external_over=0)
    data = found.directory / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:1000])
    message = r"model\.onnx, with its weights in model\.onnx_data: cannot be opened \([^\n]*\)$"
    with pytest.raises(ModelError, match=message) as error:
        Runtime.open(found.directory)
    assert ".cc:" not in str(error.value) and "ONNXRuntimeError" not in str(error.value)
    data.unlink()
    with pytest.raises(ModelError, match=r"cannot be opened \([^\n]*model\.onnx_data"):
        Runtime.open(found.directory)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("threads", [0, 1.5, "2", True, 1025])
def test_threads_are_a_whole_number(exported: Callable[..., Any], threads: Any) -> None:
    with pytest.raises(UserError, match=f"^threads: {threads!r} is not a whole number from 1 to 1024, or None$"):
        Runtime.open(exported().directory, threads=threads)


def test_the_graph_of_another_project_is_reported(exported: Callable[..., Any]) -> None:
    found = exported()
    graph = found.graph
    for each in graph.graph.node:
        each.input[:] = ["tokens" if name == "input_ids" else name for name in each.input]
    graph.graph.input[0].name = "tokens"
    onnx.save(graph, found.directory / "model.onnx")
    inputs = "attention_mask, position_ids, tokens"
    message = f"is not the expected graph: its inputs are {inputs} and its outputs .*; expected attention_mask, input_"
    with pytest.raises(ModelError, match=message):
        Runtime.open(found.directory)


def test_generation_settings_of_the_directory_are_used(exported: Callable[..., Any]) -> None:
    found = exported()
    ids, _ = left_padded(1, 5)
    first = int(Runtime.open(found.directory).generate(ids, max_new_tokens=1, eos_token_id=-1)[0, -1])
    (found.directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [66, first]}))
    assert Runtime.open(found.directory).generate(ids, max_new_tokens=9).shape == (1, 6)


@pytest.mark.slow
def test_a_deployed_process_imports_neither_torch_nor_transformers(exported: Callable[..., Any]) -> None:
    script = """
import sys
import numpy as np
import onnxruntime as ort
from compress.onnx.runtime import Runtime
from compress.onnx.runtime.session import Decoding
runtime = Runtime.open(sys.argv[1], threads=1)
for num_beams in (1, 2):
    print(runtime.generate(np.array([[3, 4]]), max_new_tokens=2, eos_token_id=-1, num_beams=num_beams).shape)
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "onnx", "pydantic", "scipy"}))
"""
    directory = exported().directory
    command = [sys.executable, "-c", script, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert done.stdout.splitlines() == ["(1, 4)", "(1, 4)", "[]"]


@pytest.mark.slow
def test_an_installation_without_dependencies_serves(exported: Callable[..., Any]) -> None:
    """README: numpy, onnxruntime, tokenizers, and this package with ``--no-deps``."""
    script = """
import sys
HERE = {"numpy", "onnxruntime", "tokenizers", "compress", *sys.stdlib_module_names}
class Installed:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in HERE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Installed())
import numpy as np
from tokenizers import Tokenizer, models
from compress.onnx.runtime import Runtime
tokenizer = Tokenizer(models.WordLevel({f"t{token}": token for token in range(67)}, unk_token="t0"))
prompt = np.array([tokenizer.encode("t3").ids])
runtime = Runtime.open(sys.argv[1], threads=1)
for options in ({}, {"num_beams": 2}, {"do_sample": True, "top_p": 0.9, "seed": 0}):
    found = runtime.generate(prompt, max_new_tokens=2, eos_token_id=-1, **options)
    print(len(tokenizer.decode(found[0].tolist()).split()))
try:
    import pydantic
except ModuleNotFoundError:
    print("alone")
"""
    command = [sys.executable, "-c", script, str(exported().directory)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.stdout.splitlines() == ["3", "3", "3", "alone"], done.stderr


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_prompt_is_read_as_it_is_fed(exported: Callable[..., Any], shape: dict[str, int]) -> None:
    runtime = Runtime.open(exported(**shape).directory, threads=1)
    ids, mask = left_padded(3, 7)
    fed, read = runtime.start(3), runtime.start(3)
    for tokens, real in ((ids, mask), (ids[:, :3], mask[:, 4:]), (ids[:, :1], mask[:, 6:])):
        expected = fed.feed(tokens, real)[:, -1]
        np.testing.assert_allclose(read.read(tokens, real), expected, atol=1e-5)
    np.testing.assert_allclose(read.feed(ids), fed.feed(ids), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_head_computes_one_position_of_a_prompt(
    exported: Callable[..., Any], shape: dict[str, int], tmp_path: Path
) -> None:
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = ort.InferenceSession(exported(**shape).directory / "model.onnx", options)
    Decoding(session, 2, 9).read(*left_padded(2, 7))
    events = json.loads(Path(session.end_profiling()).read_text())
    runs = [event["args"]["output_type_shape"] for event in events if event["name"] == "lm_head_kernel_time"]
    assert runs == [[{"float": [2, 1, 67]}]]
