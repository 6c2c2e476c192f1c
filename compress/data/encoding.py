"""Turn plain rows into token rows that fit the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable

from compress.data.interface import ModelInterface
from compress.data.readers import TextPair, TokenRow, read_pairs, read_text, read_tokens
from compress.data.sources import DataSpec, Source
from compress.data.split import Example, Split
from compress.data.targets import response_row
from compress.data.tokenizing import Ids, encode_each, encode_stream
from compress.errors import DataError
from compress.models.structure import IGNORE

_FITS = {"causal": ("text", "prompt", "tokens"), "seq2seq": ("pair", "tokens")}
_SPELLED = {"text": "running text", "prompt": "prompt and response", "pair": "source and target", "tokens": "input_ids"}


@dataclass(frozen=True)
class Encoder:
    """Makes splits for one model. ``name`` is the name of the splits; errors do not repeat it."""

    spec: DataSpec
    model: ModelInterface
    tokenizer: Any
    name: str

    @property
    def block(self) -> int:
        """The longest row of a causal model."""
        return self.spec.block or self.model.context

    def split(self, source: Source, base: Path) -> tuple[Split, str]:
        """Return the split, and a digest of the plain rows it was made of."""
        if source.layout not in _FITS[self.model.task]:
            able = " or ".join(_SPELLED[layout] for layout in _FITS[self.model.task])
            raise DataError(f"{_SPELLED[source.layout]} does not fit a {self.model.task} model; give {able}")
        if source.layout != "tokens" and self.tokenizer is None:
            raise DataError("the model has no tokenizer; give rows of input_ids, or a model with a tokenizer")
        if source.layout == "text":
            text = "\n".join(read_text(source, base))
            return self.text(text), _digest([text])
        if source.layout == "tokens":
            rows: Any = self._without_padding(read_tokens(source, base))
            split = self.tokens(rows)
        else:
            rows = read_pairs(source, base)
            split = self.prompts(rows) if source.layout == "prompt" else self.pairs(rows)
        return split, _digest(rows)

    def text(self, text: str) -> Split:
        """Return one stream of tokens in blocks. Every token except the first is scored once."""
        ids = encode_stream(self.tokenizer, text)
        if len(ids) < 2:
            raise DataError(f"the text has {len(ids)} tokens; nothing is left to predict")
        inputs, labels = ids[:-1], ids[1:]
        starts = range(0, len(inputs), self.block)
        split = self._split(*([row[at : at + self.block] for at in starts] for row in (inputs, labels)))
        return replace(split, text=text, lines=text.count("\n") + 1)

    def prompts(self, pairs: Sequence[TextPair]) -> Split:
        """Return rows of a prompt, its first response and the end token. The prompt is not scored."""
        prompts = [self._without_end(row) for row in self._encode([pair.text for pair in pairs], special=True)]
        responses = self._ended(self._encode([pair.references[0] for pair in pairs], special=False))
        kept = [row[-self.spec.max_source :] for row in prompts] if self.spec.max_source else prompts
        cut = self._cut(responses, self.spec.max_target)
        longest = self.block + 1  # the last token is only predicted
        whole = [
            self._joined(at, prompt, response) for at, (prompt, response) in enumerate(zip(kept, cut, strict=True))
        ]
        rows = [TokenRow(row.input_ids[:longest], (row.labels or [])[:longest]) for row in whole]
        before = zip(prompts, responses, strict=True)
        truncated = sum(
            len(row.input_ids) < len(one) + len(other) for row, (one, other) in zip(rows, before, strict=True)
        )
        return replace(self._causal(rows), examples=_examples(kept, pairs), truncated=truncated, blank=_blank(pairs))

    def _joined(self, at: int, prompt: list[int], response: list[int]) -> TokenRow:
        length = len(prompt) + len(response)
        if len(prompt) >= self.block:
            raise DataError(
                f"row {at}: the prompt's {len(prompt)} tokens leave no room for a "
                f"response in {self.block} tokens; cut prompts with max_source"
            )
        if length > self.block + 1 and self.spec.block is None:
            raise DataError(
                f"row {at}: prompt and response have {length} tokens; the model accepts at most "
                f"{self.block + 1} (cut responses with block or max_target)"
            )
        return TokenRow(prompt + response, [IGNORE] * len(prompt) + response)

    def pairs(self, pairs: Sequence[TextPair]) -> Split:
        """Return rows of a source and its first target with the end token."""
        sources = self._encode([pair.text for pair in pairs], special=True)
        targets = self._ended(self._encode([pair.references[0] for pair in pairs], special=True))
        kept, cut = self._cut(sources, self.spec.max_source, keep_end=True), self._cut(targets, self.spec.max_target)
        self._require_tokens(kept, cut, pairs)
        truncated = sum(a != b or c != d for a, b, c, d in zip(sources, kept, targets, cut, strict=True))
        split = self._split(kept, cut)
        return replace(split, examples=_examples(kept, pairs), truncated=truncated, blank=_blank(pairs))

    def _require_tokens(
        self, sources: Sequence[list[int]], targets: Sequence[list[int]], pairs: Sequence[TextPair]
    ) -> None:
        """Refuse rows that are empty because the tokenizer adds no special tokens."""
        for name, rows in (("source", sources), ("target", targets)):
            for at, row in enumerate(rows):
                if not row:
                    raise DataError(
                        f"row {at}: the {name} is empty, and the tokenizer adds no special token; remove the row"
                    )
        if not any(pair.references[0].strip() for pair in pairs):
            raise DataError("every target is empty; name the column or the file that contains them")

    def _without_padding(self, rows: list[TokenRow]) -> list[TokenRow]:
        """Cut the targets of a seq2seq model after their last scored token. Causal rows stay as they are."""
        if self.model.task == "causal":
            return rows
        return [TokenRow(ids, labels if labels is None else _until_scored(labels)) for ids, labels in rows]

    def tokens(self, rows: Sequence[TokenRow]) -> Split:
        """Return rows of token ids. A causal row without labels is scored on its own tokens."""
        causal = self.model.task == "causal"
        longest = self.model.context + causal  # the last token of a causal row is only predicted
        for at, row in enumerate(rows):
            for name, ids in row._asdict().items():
                if ids is not None and len(ids) > longest:
                    raise DataError(
                        f"row {at} has {len(ids)} {name}; the model accepts at most {longest} "
                        "(rows of token ids are never cut; give shorter ones)"
                    )
        if causal:
            for at, (ids, labels) in enumerate(rows):
                if labels is not None and len(labels) != len(ids):
                    raise DataError(f"row {at} has {len(ids)} input_ids and {len(labels)} labels")
                if len(ids) < 2:
                    raise DataError(f"row {at} has one token; nothing is left to predict")
            return self._causal(rows)
        if any(labels is None for _, labels in rows):
            raise DataError("rows of input_ids for a seq2seq model need labels")
        self._refuse_padding(rows)
        return self._split([row.input_ids for row in rows], [row.labels or [] for row in rows])

    def with_responses(self, rows: Sequence[Mapping[str, list[int]]]) -> Split:
        """Return rows of a ``source`` (or prompt), which is not scored, and a ``target``."""
        made = [response_row(row["source"], row["target"], self.model.task) for row in rows]
        return self._split([row["input_ids"] for row in made], [row["labels"] for row in made])

    def _refuse_padding(self, rows: Sequence[TokenRow]) -> None:
        """Refuse padding inside rows: the model would read and score it."""
        pad = self.model.pad
        for at, row in enumerate(rows):
            for name, ids in row._asdict().items():
                if ids[-1:] == [pad] != [self.model.eos]:
                    raise DataError(
                        f"row {at}: {name} ends with the padding token {pad}; batches are padded "
                        "automatically, so give rows without padding"
                    )

    def _causal(self, rows: Sequence[TokenRow]) -> Split:
        """Align: position t reads token t and predicts token t + 1."""
        return self._split(
            [row.input_ids[:-1] for row in rows],
            [(row.input_ids if row.labels is None else row.labels)[1:] for row in rows],
        )

    def _split(self, inputs: Sequence[Sequence[int] | Ids], labels: Sequence[Sequence[int] | Ids]) -> Split:
        scored = [int(np.count_nonzero(np.asarray(row) != IGNORE)) for row in labels]
        if not any(scored):
            raise DataError("no token is scored, because all labels are -100")
        named = {"input_ids": inputs, "labels": labels}
        columns = {name: self._column(found, name) for name, found in named.items()}
        lengths = [len(one) + len(other) for one, other in zip(inputs, labels, strict=True)]
        table = InMemoryTable(pa.table({**columns, "length": pa.array(lengths, pa.int64())}))
        rows = Dataset(table, fingerprint=self.name)  # without a fingerprint, datasets copies all rows to compute one
        return Split(self.name, rows, self.model, tokens=sum(scored), blank=scored.count(0))

    def _column(self, rows: Sequence[Sequence[int] | Ids], column: str) -> pa.LargeListArray:
        """Return the rows with four bytes per token. Raises DataError for a row that does not fit the model."""
        fitting = []
        for at, row in enumerate(rows):
            if len(row) > self.model.context:
                option = {"input_ids": "max_source", "labels": "max_target"}[column]
                raise DataError(
                    f"row {at}: {column} has {len(row)} tokens; the model accepts at most "
                    f"{self.model.context} (cut longer rows with {option})"
                )
            ids = np.asarray(row, np.int64)
            wrong = (ids < 0) | (ids >= self.model.vocabulary)
            if column == "labels":
                wrong &= ids != IGNORE
            if wrong.any():
                raise DataError(
                    f"row {at}: token {ids[wrong].max()} is not in the model's vocabulary of {self.model.vocabulary}"
                )
            fitting.append(ids.astype(np.int32))
        offsets = np.cumsum([0, *map(len, rows)])
        return pa.LargeListArray.from_arrays(offsets, np.concatenate(fitting))

    def _encode(self, texts: list[str], *, special: bool) -> list[list[int]]:
        return encode_each(self.tokenizer, texts, special=special)

    def _ended(self, rows: Iterable[list[int]]) -> list[list[int]]:
        end = [] if self.model.eos is None else [self.model.eos]
        return [row if row[-1:] == end else row + end for row in rows]

    def _without_end(self, row: list[int]) -> list[int]:
        return row[:-1] if row[-1:] == [self.model.eos] and len(row) > 1 else row

    def _cut(self, rows: list[list[int]], longest: int | None, *, keep_end: bool = False) -> list[list[int]]:
        if longest is None:
            return rows
        end = [self.model.eos] if keep_end and self.model.eos is not None else []
        return [_shortened(row, longest, end) for row in rows]


def _shortened(row: list[int], longest: int, end: Sequence[int]) -> list[int]:
    """Cut a row that is too long. If the row ends with ``end``, the result does as well."""
    if len(row) <= longest:
        return row
    end = list(end) if row[-len(end) :] == end else []
    return row[: longest - len(end)] + end


def _until_scored(labels: list[int]) -> list[int]:
    return labels[: max((at + 1 for at, label in enumerate(labels) if label != IGNORE), default=0)]


def _examples(inputs: Sequence[list[int]], pairs: Sequence[TextPair]) -> tuple[Example, ...]:
    return tuple(Example(ids, pair.text, pair.references) for ids, pair in zip(inputs, pairs, strict=True))


def _blank(pairs: Sequence[TextPair]) -> int:
    return sum(not pair.text.strip() or not pair.references[0].strip() for pair in pairs)


def _digest(rows: Iterable[object]) -> str:
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps(row).encode() + b"\n")
    return content.hexdigest()
