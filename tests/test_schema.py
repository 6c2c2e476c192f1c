"""Old spellings of fields are refused, and the error names the present one."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from compress.generation.settings import Decoding, Generation
from compress.measure.speed import Speed
from compress.schema import Strict
from compress.stages.bitsandbytes import BitsAndBytes
from compress.surgery.quantization import ActivationQuantization


class _Example(Strict):
    renamed: ClassVar[dict[str, str]] = {"old": "new"}

    new: int = 1


def _classes(base: type[Strict]) -> Iterator[type[Strict]]:
    yield base
    for one in base.__subclasses__():
        yield from _classes(one)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (_Example, {"old": 2}, "old is now called new"),
        (Generation, {"beams": 4}, "beams is now called num_beams"),
        (Decoding, {"no_repeat_ngram": 3}, "no_repeat_ngram is now called no_repeat_ngram_size"),
        (Speed, {"prompt": 64}, "prompt is now called prompt_tokens"),
        (ActivationQuantization, {"scheme": "block"}, "scheme is now called granularity"),
        (ActivationQuantization, {"scheme": "paper"}, "scheme: paper is now called granularity: tensor"),
        (BitsAndBytes, {"scheme": "fp4"}, "scheme is now called quant_type"),
    ],
)
def test_an_old_spelling_is_refused_with_the_present_one(
    config: type[Strict], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        config.model_validate(given)


def test_an_unknown_key_without_a_new_name_gets_a_suggestion() -> None:
    with pytest.raises(ValidationError, match="unknown key 'nev'"):
        _Example.model_validate({"nev": 1})


def test_old_spellings_lead_to_fields_that_exist() -> None:
    renaming = [one for one in _classes(Strict) if one.renamed]
    assert {ActivationQuantization, BitsAndBytes, Generation, Speed} <= set(renaming)
    for one in renaming:
        old, new = ({text.split(":")[0] for text in texts} for texts in (one.renamed, one.renamed.values()))
        assert new <= set(one.model_fields), one
        assert old <= set(one.renamed) and not old & set(one.model_fields), one
