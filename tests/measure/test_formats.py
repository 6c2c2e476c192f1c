"""Numbers as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.measure import formats
from compress.measure.record import Percentiles


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.7123, "0.712"),
        (3.6e-07, "3.6e-07"),
        (0.0, "0"),
        (54.879, "54.88"),
        (474.7, "474.7"),
        (1408.4, "1,408"),
        (2000, "2,000"),
        (-3.5, "-3.50"),
    ],
)
def test_number(value, text):
    assert formats.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (950, "950"), (64_085_504, "64.1 M"), (1_500_000_000, "1.5 B"), (2_000, "2.0 k")]
)
def test_count(value, text):
    assert formats.count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (3.14, "3.1 s"), (60, "1 min 00 s"), (3599.6, "1 h 00 min"), (3840, "1 h 04 min")]
)
def test_duration(seconds, text):
    assert formats.duration(seconds) == text


def test_megabytes_are_powers_of_two():
    assert formats.megabytes(2**20) == "1.00"


def test_percentiles_without_a_tail():
    assert formats.percentiles(Percentiles(p50=1.5)) == "1.50"


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_share_is_whole_or_nothing_only_when_it_is(part, more):
    whole = part + more
    assert formats.share(whole, whole) == "100 %"
    assert formats.share(0, whole) == "0 %"
    assert formats.share(part, whole) not in {"100 %", "100.0 %", "0.0 %"}


def test_flat_keeps_every_leaf():
    nested = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": "x"}, {"e": "y"}], "none": None, "empty": []}
    assert list(formats.flat(nested)) == [("a.b", "1"), ("a.c", "1, 2"), ("d.e", "x"), ("d.e", "y")]
