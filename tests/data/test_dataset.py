import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig, GPT2Config

from compress.data import Data, DataSpec, ModelInterface, Split, open_data
from compress.errors import DataError
from compress.models.structure import IGNORE

from .conftest import LINES

Written = dict[str, Any]


def opened(written: Written, tokenizer: Any, model: ModelInterface, base: Path) -> Data:
    return open_data(DataSpec.model_validate(written), tokenizer=tokenizer, model=model, base=base)


def train(written: Written, tokenizer: Any, model: ModelInterface, base: Path) -> Split:
    split = opened(written, tokenizer, model, base).train
    assert split is not None
    return split


PROMPT = {"json": "rows.jsonl", "prompt": "question", "response": "answer"}
PAIR = {"json": "rows.jsonl", "source": "question", "target": "more"}
TOKENS = {"json": "rows.jsonl", "input_ids": "ids", "labels": "labels"}


@pytest.mark.parametrize("strip", [True, False])
def test_text_is_one_stream_and_every_token_but_the_first_is_scored_once(
    folder: Path, causal_tokenizer: Any, causal: ModelInterface, strip: bool
) -> None:
    split = train({"train": {"text": "lines.txt", "strip": strip}, "block": 7}, causal_tokenizer, causal, folder)
    text = "\n".join(LINES if strip else [f" {line} " for line in LINES])
    stream = causal_tokenizer(text)["input_ids"]
    assert split.text == text
    read = [token for row in split for token in row["input_ids"]]
    scored = [token for row in split for token in row["labels"]]
    assert read == stream[:-1]
    assert scored == stream[1:]
    assert {len(row["labels"]) for row in list(split)[:-1]} == {7}
    assert split.tokens == len(stream) - 1
    assert split.words == sum(len(line.split()) for line in LINES) + len(LINES)
    assert split.longest == 7


def test_rows_that_keep_their_line_end_are_the_same_text(
    folder: Path, causal_tokenizer: Any, causal: ModelInterface
) -> None:
    (folder / "ended.jsonl").write_text(
        "".join(json.dumps({"text": f"{line}\n" if line else ""}) + "\n" for line in LINES)
    )
    ended = train({"train": {"json": "ended.jsonl"}}, causal_tokenizer, causal, folder)
    lines = train({"train": {"text": "lines.txt", "strip": True}}, causal_tokenizer, causal, folder)
    assert (ended.text, ended.words) == (lines.text, lines.words)
    (folder / "twice.jsonl").write_text(json.dumps({"text": "a \n\n"}) + "\n" + json.dumps({"text": "b\n"}) + "\n")
    for strip, text in ((False, "a \n\nb"), (True, "a\n\nb")):
        split = train({"train": {"json": "twice.jsonl", "strip": strip}}, causal_tokenizer, causal, folder)
        assert (split.text, split.lines) == (text, 3)


CODE = "def f(x):\n    return x\n\n\n\tx = 2 \x0c\u2028\n  "


@pytest.mark.parametrize("kind", ["text", "json"])
def test_indentation_empty_lines_and_spaces_are_text(
    tmp_path: Path, causal_tokenizer: Any, causal: ModelInterface, kind: str
) -> None:
    (tmp_path / "code").write_text(CODE + "\n" if kind == "text" else json.dumps({"text": CODE}))
    split = train({"train": {kind: "code"}}, causal_tokenizer, causal, tmp_path)
    assert split.text == CODE
    assert causal_tokenizer.decode([split[0]["input_ids"][0], *split[0]["labels"]]) == CODE
    assert (split.lines, split.words) == (6, 7 + 6)
    stripped = train({"train": {kind: "code", "strip": True}}, causal_tokenizer, causal, tmp_path)
    assert stripped.text == "def f(x):\nreturn x\n\n\nx = 2\n"
    assert (stripped.lines, stripped.words) == (split.lines, split.words)
    assert stripped.tokens < split.tokens


def test_the_default_block_is_the_context(folder: Path, causal_tokenizer: Any, causal: ModelInterface) -> None:
    split = train({"train": {"text": "lines.txt"}}, causal_tokenizer, replace(causal, context=5), folder)
    assert split.longest == 5


def test_text_shorter_than_a_block_is_one_row_that_batches_repeat(
    folder: Path, causal_tokenizer: Any, causal: ModelInterface
) -> None:
    (folder / "short.txt").write_text("the cat\n")
    split = train({"train": {"text": "short.txt"}, "block": 64}, causal_tokenizer, causal, folder)
    ids = causal_tokenizer("the cat")["input_ids"]
    assert [row["labels"] for row in split] == [ids[1:]]
    batches = list(split.loader(16, seed=3, shuffle=True, steps=3))
    assert [batch["labels"].tolist() for batch in batches] == [[ids[1:]]] * 3


def test_the_prompt_is_not_scored_and_the_response_ends(
    folder: Path, causal_tokenizer: Any, causal: ModelInterface
) -> None:
    split = train({"train": PROMPT}, causal_tokenizer, causal, folder)
    prompt, answer = (causal_tokenizer(text)["input_ids"] for text in ("the cat?\n", "sat"))
    whole = prompt + answer + [causal.eos]
    assert split[0]["input_ids"] == whole[:-1]
    assert split[0]["labels"] == [IGNORE] * (len(prompt) - 1) + whole[len(prompt) :]
    assert split.examples[0].input_ids == prompt
    assert split.examples[0].references == ("sat",)
    assert split.words is None


def test_pairs_train_on_the_first_reference(folder: Path, seq2seq_tokenizer: Any, seq2seq: ModelInterface) -> None:
    split = train({"train": PAIR}, seq2seq_tokenizer, seq2seq, folder)
    assert split[0]["input_ids"] == seq2seq_tokenizer("the cat?")["input_ids"]
    assert split[0]["labels"] == seq2seq_tokenizer("sat")["input_ids"]
    assert split[0]["labels"][-1] == seq2seq.eos
    assert split.examples[0].references == ("sat", "ate")


def test_ready_tokens_need_no_tokenizer(folder: Path) -> None:
    split = train({"train": TOKENS}, None, ModelInterface("causal", 8, 10), folder)
    assert split[0] == {"input_ids": [1, 2], "labels": [2, 3], "length": 4}
    own = train({"train": {"json": "rows.jsonl", "input_ids": "ids"}}, None, ModelInterface("causal", 8, 10), folder)
    assert own[0]["labels"] == [2, 3]
    pairs = train({"train": TOKENS}, None, ModelInterface("seq2seq", 8, 10, decoder_start=0), folder)
    assert pairs[0]["labels"] == [IGNORE, 2, 3]


def test_what_is_cut_is_cut_as_asked_and_counted(
    folder: Path, causal_tokenizer: Any, seq2seq_tokenizer: Any, causal: ModelInterface, seq2seq: ModelInterface
) -> None:
    source = seq2seq_tokenizer("the cat?")["input_ids"]
    pairs = train({"train": PAIR, "max_source": 4, "max_target": 2}, seq2seq_tokenizer, seq2seq, folder)
    assert pairs[0]["input_ids"] == [*source[:3], seq2seq.eos]
    assert len(pairs[0]["labels"]) == 2
    assert pairs.truncated == 2
    prompt = causal_tokenizer("the cat?\n")["input_ids"]
    prompts = train({"train": PROMPT, "max_source": 3, "block": 4}, causal_tokenizer, causal, folder)
    assert prompts.examples[0].input_ids == prompt[-3:]
    assert {len(row["input_ids"]) for row in prompts} == {4}
    assert prompts.truncated == 2


@pytest.mark.parametrize(
    ("written", "changed", "message"),
    [
        ({"train": {"text": "lines.txt"}, "block": 128}, {}, "data.block: 128, but the model accepts at most 64"),
        (
            {"train": PAIR},
            {},
            "source and target does not fit a causal model; give running text or prompt and response",
        ),
        ({"train": {"text": "lines.txt"}}, {"task": "seq2seq"}, "running text does not fit a seq2seq model"),
        ({"train": PROMPT}, {"context": 3}, "row 0: the prompt's 4 tokens leave no room for a response in 3"),
        (
            {"train": PROMPT},
            {"context": 6},
            r"row 1: prompt and response have \d+ tokens; the model accepts at most 7 \(cut",
        ),
        (
            {"train": {"text": "lines.txt"}},
            {"vocabulary": 200},
            r"row 0: token \d+ is not in the model's vocabulary of 200",
        ),
        ({"train": TOKENS}, {"context": 1}, "row 0 has 3 input_ids; the model accepts at most 2"),
        ({"train": TOKENS}, {"vocabulary": 4}, "row 1: token 4 is not in the model's vocabulary of 4"),
        ({"train": {"json": "rows.jsonl", "input_ids": "ids"}}, {"task": "seq2seq"}, "a seq2seq model need labels"),
        ({"train": {"text": "one.txt"}}, {}, "the text has 1 tokens; nothing is left to predict"),
        ({"train": {"json": "none.jsonl", "input_ids": "ids", "labels": "labels"}}, {}, "no token is scored"),
        (
            {"train": {"json": "short.jsonl", "input_ids": "ids", "labels": "labels"}},
            {},
            "has 2 input_ids and 1 labels",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    folder: Path, causal_tokenizer: Any, causal: ModelInterface, written: Written, changed: Written, message: str
) -> None:
    (folder / "one.txt").write_text("a\n")
    (folder / "none.jsonl").write_text(json.dumps({"ids": [1, 2], "labels": [-100, -100]}))
    (folder / "short.jsonl").write_text(json.dumps({"ids": [1, 2], "labels": [1]}))
    with pytest.raises(DataError, match=message) as caught:
        opened(written, causal_tokenizer, replace(causal, **changed), folder)
    assert str(caught.value).startswith("data.")


def test_sources_that_are_too_long_name_max_source(
    folder: Path, seq2seq_tokenizer: Any, seq2seq: ModelInterface
) -> None:
    with pytest.raises(
        DataError, match=r"input_ids has \d+ tokens; the model accepts at most 5 \(cut longer rows with max_source"
    ):
        opened({"train": PAIR}, seq2seq_tokenizer, replace(seq2seq, context=5), folder)


@pytest.mark.parametrize("name", ["max_source", "max_target"])
def test_a_limit_beyond_the_positions_is_refused(
    folder: Path, seq2seq_tokenizer: Any, seq2seq: ModelInterface, name: str
) -> None:
    opened({"train": PAIR, name: 64}, seq2seq_tokenizer, seq2seq, folder)
    with pytest.raises(DataError, match=rf"^data\.{name}: 65, but the model accepts at most 64 tokens"):
        opened({"train": PAIR, name: 65}, seq2seq_tokenizer, seq2seq, folder)


def test_columns_may_differ_between_splits(folder: Path, seq2seq_tokenizer: Any, seq2seq: ModelInterface) -> None:
    three = {"dialogue": "the cat?", "summary1": "sat", "summary2": None, "summary3": " ", "summary4": "ate"}
    (folder / "test.jsonl").write_text(json.dumps(three))
    test = {"json": "test.jsonl", "source": "dialogue", "target": [f"summary{at}" for at in (1, 2, 3, 4)]}
    data = opened({"train": PAIR, "test": test}, seq2seq_tokenizer, seq2seq, folder)
    assert data.test is not None
    assert data.test.examples[0].references == ("sat", "ate")
    assert data.test[0]["labels"] == seq2seq_tokenizer("sat")["input_ids"]


def test_rows_without_a_word_stay_and_are_counted(
    folder: Path, seq2seq_tokenizer: Any, seq2seq: ModelInterface
) -> None:
    rows = [{"s": "the cat", "t": ""}, {"s": " ", "t": "sat"}, {"s": "a dog", "t": "ran"}]
    (folder / "blank.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = {"train": {"json": "blank.jsonl", "source": "s", "target": "t"}}
    split = train(written, seq2seq_tokenizer, seq2seq, folder)
    assert (len(split), split.blank) == (3, 2)
    assert split[0]["labels"] == seq2seq_tokenizer("")["input_ids"]
    assert len(split[0]["labels"]) > 0
    (folder / "blank.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(DataError, match=r"^data\.train: every target is empty"):
        train(written, seq2seq_tokenizer, seq2seq, folder)


def test_ready_rows_of_which_nothing_is_scored_are_counted(
    folder: Path, causal: ModelInterface, seq2seq: ModelInterface
) -> None:
    rows = [{"ids": [5, 6], "labels": [-100, -100]}, {"ids": [5, 6], "labels": [6, -100]}, {"ids": [5], "labels": [7]}]
    written = {"train": {"json": "odd.jsonl", "input_ids": "ids", "labels": "labels"}}
    (folder / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(written, None, seq2seq, folder).blank == 1
    (folder / "odd.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows[:2]) + '{"ids": [5, 6], "labels": [5, 6]}'
    )
    assert train(written, None, causal, folder).blank == 2  # a first token is read and not predicted


def test_an_empty_source_of_a_tokenizer_without_special_tokens_is_reported(
    folder: Path, causal_tokenizer: Any, seq2seq: ModelInterface
) -> None:
    rows = [{"s": "the cat", "t": "sat"}, {"s": "", "t": "ran"}]
    (folder / "blank.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"data\.train: row 1: the source is empty, and the tokenizer adds no"):
        train({"train": {"json": "blank.jsonl", "source": "s", "target": "t"}}, causal_tokenizer, seq2seq, folder)


@pytest.mark.parametrize("column", ["input_ids", "labels"])
def test_ready_rows_bring_no_padding(folder: Path, column: str) -> None:
    model = ModelInterface("seq2seq", 8, 10, pad=1, eos=2, decoder_start=2)
    row = {"input_ids": [5, 2], "labels": [1, 6, 2]}
    written = {"train": {"json": "ready.jsonl", "input_ids": "input_ids", "labels": "labels"}}
    (folder / "ready.jsonl").write_text(json.dumps(row))
    train(written, None, model, folder)
    (folder / "ready.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {column: [*row[column], 1]}))
    with pytest.raises(DataError, match=rf"row 1: {column} ends with the padding token 1; batches are padded"):
        train(written, None, model, folder)
    train(written, None, replace(model, pad=1, eos=1), folder)  # there 1 ends a row


@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_ready_rows_that_are_too_long_are_not_said_to_be_cut(folder: Path, task: Any) -> None:
    """No setting of the recipe would cut them, so none is advised; a causal model never reads the last token."""
    fits = {"causal": 5, "seq2seq": 4}[task]
    model = ModelInterface(task, 4, 10, decoder_start=0)
    written = {"train": {"json": "long.jsonl", "input_ids": "ids", "labels": "labels"}}
    for size in (fits, fits + 1):
        (folder / "long.jsonl").write_text(json.dumps({"ids": [1] * size, "labels": [1] * size}))
        if size == fits:
            opened(written, None, model, folder)
    why = r"\(rows of token ids are never cut; give shorter ones\)"
    message = rf"row 0 has {fits + 1} input_ids; the model accepts at most {fits} {why}"
    with pytest.raises(DataError, match=message):
        opened(written, None, model, folder)


def test_ready_targets_that_are_too_long_are_reported(folder: Path) -> None:
    (folder / "long.jsonl").write_text(json.dumps({"ids": [1], "labels": [1] * 5}))
    written = {"train": {"json": "long.jsonl", "input_ids": "ids", "labels": "labels"}}
    with pytest.raises(DataError, match="row 0 has 5 labels; the model accepts at most 4"):
        opened(written, None, ModelInterface("seq2seq", 4, 10, decoder_start=0), folder)


def test_text_without_a_tokenizer_is_refused(folder: Path, causal: ModelInterface) -> None:
    with pytest.raises(DataError, match=r"data\.test: the model has no tokenizer; give rows of input_ids"):
        opened({"test": {"text": "lines.txt"}}, None, causal, folder)


def test_the_digest_is_of_content(
    folder: Path, causal_tokenizer: Any, seq2seq_tokenizer: Any, causal: ModelInterface
) -> None:
    written = {"train": {"text": "lines.txt"}, "block": 8}

    def digest(written: Written, tokenizer: Any = causal_tokenizer) -> str:
        return opened(written, tokenizer, causal, folder).digest

    first = digest(written)
    causal_tokenizer.backend_tokenizer.enable_padding()
    assert digest(written) == first
    causal_tokenizer.backend_tokenizer.no_padding()
    (folder / "lines.txt").rename(folder / "moved.txt")
    moved = {"train": {"text": "moved.txt"}, "block": 8}
    assert digest(moved) == first
    assert digest({**moved, "block": 9}) != first
    assert digest({"eval": moved["train"], "block": 8}) != first
    assert digest(moved, seq2seq_tokenizer) != first
    (folder / "moved.txt").write_text("\n".join(LINES) + "!\n")
    assert digest(moved) != first


def test_the_interface_reads_stock_configs(seq2seq_tokenizer: Any) -> None:
    gpt2 = ModelInterface.of(GPT2Config(n_positions=32, vocab_size=50, eos_token_id=7, bos_token_id=7))
    assert gpt2 == ModelInterface("causal", context=32, vocabulary=50, pad=7, eos=7)
    bart = ModelInterface.of(BartConfig(max_position_embeddings=16, vocab_size=40), seq2seq_tokenizer)
    tokens = seq2seq_tokenizer
    assert bart == ModelInterface("seq2seq", 16, 40, tokens.pad_token_id, tokens.eos_token_id, decoder_start=2)


@pytest.mark.slow
def test_a_spec_is_read_without_the_datasets_library() -> None:
    code = "import sys, compress.data; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
