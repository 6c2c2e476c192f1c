"""The responses of a model to many prompts, and the part of their text that a report shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from compress.data import Example, Split
from compress.generation.settings import Decoding
from compress.generation.subject import Subject
from compress.training.progress import Advance

SAMPLES = 24
"""How many rows keep their text. The same, evenly spread rows are kept each time, so that runs can be compared."""

Generate = Callable[[Sequence[list[int]], int], list[list[int]]]
"""Takes the prompts of a batch and the batch's number, and returns one response per prompt."""


class Response(NamedTuple):
    """A generated text, and whether it has the maximum number of tokens, counting its end token."""

    text: str
    full: bool


def responses(
    prompts: Sequence[list[int]],
    batch_size: int,
    generate: Generate,
    *,
    longest_first: bool = False,
    done: Sequence[list[list[int]]] = (),
    finished: Callable[[list[list[int]]], None] = lambda batch: None,
) -> list[list[int]]:
    """Return one response per prompt, in the order of the prompts.

    Args:
        prompts: token ids of each prompt.
        batch_size: how many prompts each batch has. Prompts of similar length share a batch.
        generate: called once per batch with its prompts and its number, from 0.
        longest_first: start with the longest prompts, so that a lack of memory shows at once.
        done: responses of the first batches, from an earlier run with the same prompts and batch size.
        finished: called with the responses of each new batch.
    """
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]) if longest_first else len(prompts[at]))
    found: list[list[int]] = [[] for _ in prompts]
    for number, first in enumerate(range(0, len(order), batch_size)):
        rows = order[first : first + batch_size]
        if number < len(done):
            batch = done[number]
        else:
            batch = generate([prompts[at] for at in rows], number)
            finished(batch)
        for at, response in zip(rows, batch, strict=True):
            found[at] = response
    return found


def response_texts(
    subject: Subject,
    tokenizer: Any,
    split: Split,
    decoding: Decoding,
    batch_size: int,
    seed: int,
    advance: Advance = lambda rows: None,
) -> list[Response]:
    """Return the text of the response to each example of ``split``.

    ``advance`` is called with the number of rows of each batch.
    """

    def generate(prompts: Sequence[list[int]], number: int) -> list[list[int]]:
        return subject.generate(prompts, decoding, seed * 1_000_003 + number)

    prompts = [example.input_ids for example in split.examples]
    found = responses(prompts, batch_size, generate, finished=lambda batch: advance(len(batch)))
    return [_response(ids, tokenizer, decoding) for ids in found]


def _response(ids: list[int], tokenizer: Any, decoding: Decoding) -> Response:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    # A forced end token takes the last place. Such a text did not end by itself, so it counts as full.
    return Response(text, len(ids) + 1 >= decoding.max_new_tokens)


def samples(examples: Sequence[Example], outputs: Sequence[str]) -> list[dict[str, Any]]:
    """Return number, input, references and output of up to :data:`SAMPLES` evenly spread rows, including the first."""
    count = min(SAMPLES, len(outputs))
    rows = [at * len(outputs) // count for at in range(count)]
    return [
        {
            "row": row,
            "input": examples[row].text,
            "references": list(examples[row].references),
            "output": outputs[row],
        }
        for row in rows
    ]
