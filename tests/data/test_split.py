from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.data.interface import ModelInterface
from compress.data.split import BatchRange, Order, Split, collate
from compress.errors import DataError
from compress.models.structure import IGNORE

CAUSAL = ModelInterface("causal", 64, 100, pad=9)
SEQ2SEQ = ModelInterface("seq2seq", 64, 100, pad=9, eos=2, decoder_start=2)

orders = st.builds(
    Order,
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=150).map(np.asarray),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    shuffle=st.booleans(),
)


@pytest.mark.slow
@given(orders, st.integers(0, 3))
def test_an_epoch_holds_each_row_at_most_once_and_all_but_a_short_batch(order: Order, number: int) -> None:
    batches = order.epoch(number)
    rows = [row for batch in batches for row in batch]
    assert len(batches) == order.per_epoch
    assert len(rows) == len(set(rows))
    if order.shuffle:
        assert {len(batch) for batch in batches} == {min(order.batch_size, len(order.lengths))}
    else:
        assert rows == list(range(len(order.lengths)))


@pytest.mark.slow
@given(orders, st.integers(0, 20), st.integers(0, 40))
def test_a_resumed_run_sees_what_it_would_have_seen(order: Order, start: int, stop: int) -> None:
    straight = list(BatchRange(order, 0, stop))
    assert len(straight) == stop == len(BatchRange(order, 0, stop))
    assert list(BatchRange(order, start, stop)) == straight[start:]


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int) -> Order:
        return Order(np.ones(64, int), 4, seed, shuffle=True)

    assert order(0).epoch(0) != order(0).epoch(1)
    assert order(0).epoch(0) != order(1).epoch(0)
    assert order(3).epoch(5) == order(3).epoch(5)


def test_rows_of_like_length_share_a_batch() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 512)
    drawn, apart = (Order(lengths, 8, 0, shuffle) for shuffle in (True, False))

    def padding(order: Order) -> float:
        return float(sum(lengths[batch].max() * len(batch) - lengths[batch].sum() for batch in order.epoch(0)))

    assert padding(drawn) < padding(apart) / 5


def test_causal_batch() -> None:
    batch = collate([{"input_ids": [1, 2, 3], "labels": [IGNORE, 3, 4]}, {"input_ids": [5], "labels": [6]}], CAUSAL)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 3, 4], [6, IGNORE, IGNORE]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_seq2seq_batch_shifts_labels_right() -> None:
    rows = [{"input_ids": [1, 2], "labels": [5, IGNORE, 7]}, {"input_ids": [3], "labels": [4]}]
    batch = collate(rows, SEQ2SEQ)
    assert batch["decoder_input_ids"].tolist() == [[2, 5, 9], [2, 9, 9]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, IGNORE, 7], [4, IGNORE, IGNORE]]
    assert batch["input_ids"].tolist() == [[1, 2], [3, 9]]


def make_split(rows: list[dict[str, Any]]) -> Split:
    return Split(
        "data.train", datasets.Dataset.from_list([{**row, "length": len(row["labels"])} for row in rows]), CAUSAL
    )


def test_a_batch_without_a_scored_token_is_an_error() -> None:
    split = make_split([{"input_ids": [1], "labels": [2]}, {"input_ids": [1], "labels": [IGNORE]}])
    with pytest.raises(DataError, match=r"data\.train: no token of a batch is scored"):
        list(split.loader(1))


def test_a_batch_whose_targets_are_all_padding_is_an_error() -> None:
    rows = [{"input_ids": [3, 4], "labels": [IGNORE, IGNORE]}, {"input_ids": [5], "labels": [IGNORE]}]
    with pytest.raises(DataError, match="no token of a batch is scored, because all its labels are -100"):
        collate(rows, SEQ2SEQ)
    collate([*rows, {"input_ids": [5], "labels": [6]}], SEQ2SEQ)


def test_loader_chains_epochs_and_resumes() -> None:
    split = make_split([{"input_ids": [n], "labels": [n]} for n in range(10)])
    whole = [batch["labels"].flatten().tolist() for batch in split.loader(3, seed=1, steps=7, shuffle=True)]
    resumed = [batch["labels"].flatten().tolist() for batch in split.loader(3, seed=1, start=4, steps=7, shuffle=True)]
    numbered = list(split.loader(3, seed=1, start=4, steps=7, shuffle=True, numbered=True))
    assert [batch["rows"].tolist() for batch in numbered] == resumed  # each row holds its own number
    assert "rows" not in next(iter(split.loader(3)))
    assert len(whole) == 7
    assert whole[4:] == resumed
    assert [len(batch["labels"]) for batch in split.loader(3)] == [3, 3, 3, 1]
    assert [len(batch["labels"]) for batch in split.loader(16, shuffle=True, steps=2)] == [10, 10]
