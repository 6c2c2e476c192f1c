"""Derived seeds differ wherever the numbers differ."""

from compress.generation.seeds import seed_of


def test_every_tuple_of_numbers_has_a_seed_of_its_own() -> None:
    numbers = [(0,), (5,), (0, 0), (0, 5), (5, 0), (0, 5, 0), (0, 5, 0, 0), (2, 0, 5)]
    assert len({seed_of(*each) for each in numbers}) == len(numbers)
    assert seed_of(0, 5) == seed_of(0, 5)
