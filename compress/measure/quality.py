"""Quality of models: perplexity, agreement with a reference model, and metrics of generated text."""

from __future__ import annotations

import statistics
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from rich.console import Console

from compress.artifact import Artifact
from compress.data import Data, Split
from compress.errors import DataError, RecipeError
from compress.generation.responses import Response, response_texts, samples
from compress.generation.settings import Decoding
from compress.generation.subject import Subject, subject_of
from compress.measure.likelihood import agreement, perplexity
from compress.measure.measurement import Measurement
from compress.registry import suggest
from compress.schema import Several, added
from compress.training.progress import Advance, counting

Metric = Literal["perplexity", "agreement", "rouge", "bleu", "chrf", "exact_match", "length", "distinct"]
Record = dict[str, Any]

_OF_LOGITS = ("perplexity", "agreement")


class Quality(Measurement):
    """Quality of torch and ONNX artifacts, measured by the same code in float32.

    ``perplexity`` = exp(nll / tokens) over the scored tokens. Each token is scored once, with the context in its block
    or row. On running text the record also has ``word_perplexity`` = exp(nll / (words + lines)), and ``bits_per_byte``
    and ``bits_per_character`` = nll / ln 2 / number of bytes or characters. These do not depend on the vocabulary.
    ``agreement`` is the percentage of scored tokens at which model and ``reference`` have the same most probable token.
    ``kl`` is the mean KL(reference || model) in nats.

    The other metrics score generated text. ``rouge`` (1, 2, L, Lsum; the best of several references), ``bleu``,
    ``chrf`` and ``exact_match`` compare it with all references. ROUGE is rejected if most rows have references with
    letters but none from a to z. BLEU with a tokenizer other than 13a has the tokenizer in its name, as in ``bleu_zh``.

    ``length`` counts words separated by whitespace: mean and median of outputs and of references, and their ratio. It
    also has the percentage of outputs that are ``empty``, and of outputs that have ``max_new_tokens`` tokens, counting
    the end token (``full_length``). ``distinct`` 1, 2, 3 is distinct n-grams / n-grams x 100 over all outputs.
    """

    type: Literal["quality"] = "quality"
    metric: Several[Metric] = ("perplexity",)
    """One metric, or several."""
    split: Literal["test", "eval"] = "test"
    """The split to measure on. If a run has no such split, the other one is used, and the conditions name it."""
    batch: int = Field(8, ge=1)
    """Rows per batch."""
    sentences: Literal["lines", "stops"] = "lines"
    """Sentence ends for ROUGE-Lsum: line breaks, or also . ! ? before a blank ("Mr. Smith" then splits)."""
    bleu_tokenize: Literal["13a", "intl", "zh", "char", "none"] = added("13a")
    """BLEU's tokenizer: WMT's (13a), Unicode classes (intl), characters of Chinese (zh) or all text (char), or blanks
    (none)."""
    reference: str | None = None
    """The model that ``agreement`` compares each model with."""
    decoding: Decoding = Decoding()
    """How text is generated."""

    needs_data: ClassVar[bool] = True
    names: ClassVar[frozenset[str]] = frozenset({"metric", "bleu_tokenize"})
    version: ClassVar[int] = 3

    @model_validator(mode="after")
    def _each_setting_has_its_metric(self) -> Self:
        if ("agreement" in self.metric) != (self.reference is not None):
            raise ValueError(
                "metric agreement needs reference, the model to compare with, and reference needs metric agreement"
            )
        if self.sentences != "lines" and "rouge" not in self.metric:
            raise ValueError(
                f"sentences: {self.sentences} applies only to the rouge metric, which metric does not include"
            )
        if self.bleu_tokenize != "13a" and "bleu" not in self.metric:
            raise ValueError(
                f"bleu_tokenize: {self.bleu_tokenize} applies only to the bleu metric, which metric does not include"
            )
        return self

    @property
    def compared_with(self) -> tuple[str, ...]:
        return (self.reference,) if self.reference else ()

    def run(
        self, artifacts: Mapping[str, Artifact], *, data: Data | None, device: str, console: Console | None
    ) -> dict[str, dict[str, Any]]:
        split = self._split(data)
        reference = self._reference(artifacts, device)
        records = {}
        for name, artifact in self.chosen(artifacts).items():
            if console is not None:
                console.print(f"quality of {name}: {', '.join(self.metric)} on {split.name}", highlight=False)
            subject, tokenizer = subject_of(artifact, device), artifact.tokenizer()
            records[name] = self.measured(name, subject, tokenizer, split, reference, console)
        return records

    def measured(
        self,
        name: str,
        subject: Subject,
        tokenizer: Any,
        split: Split,
        reference: Subject | None = None,
        console: Console | None = None,
    ) -> dict[str, Any]:
        """Measure one model on one split. ``console`` shows a progress bar with the title ``name``."""
        if self._texts:
            self._check_examples(split, self._texts[0])
        with counting(console, name, self._passes * len(split)) as advance:
            return self._measured(subject, tokenizer, split, reference, advance)

    def problems(self, configs: Mapping[str, Any], data: Data | None) -> Iterator[str]:
        try:
            self._split(data)
        except DataError as error:
            yield str(error).removeprefix("quality: ")

    def _split(self, data: Data | None) -> Split:
        wanted = dict.fromkeys((self.split, "test", "eval"))
        found = [split for split in (getattr(data, name, None) for name in wanted) if isinstance(split, Split)]
        if not found:
            raise DataError(
                f"quality: measures on data.{self.split}, but the recipe has neither data.test nor data.eval"
            )
        if self._texts:
            self._check_examples(found[0], self._texts[0])
        return found[0]

    @property
    def _texts(self) -> list[Metric]:
        """The metrics of generated text."""
        return [metric for metric in self.metric if metric not in _OF_LOGITS]

    @property
    def _passes(self) -> int:
        """How often each row is read."""
        return len(self.metric) - len(self._texts) + len(self.decoding.runs) * bool(self._texts)

    def _check_examples(self, split: Split, metric: str) -> None:
        if not split.examples:
            raise DataError(
                f"quality: {metric} compares generated text with references, but {split.name} has none; "
                "give prompt and response, or source and target"
            )
        if "rouge" in self.metric:
            _check_letters(split)
        new, context = self.decoding.max_new_tokens, split.model.context
        if split.model.task == "seq2seq":
            if new > context:
                raise DataError(
                    f"quality: max_new_tokens: {new}, but the model's responses have at most {context} tokens"
                )
            return
        prompt = max(len(example.input_ids) for example in split.examples)
        if prompt + new > context:
            raise DataError(
                f"quality: max_new_tokens: {new} after {prompt} tokens of {split.name} exceed the model's {context}; "
                "lower it, or cut prompts with data.max_source"
            )

    def _reference(self, artifacts: Mapping[str, Artifact], device: str) -> Subject | None:
        if self.reference is None:
            return None
        if self.reference not in artifacts:
            raise RecipeError(
                f"quality.reference names {self.reference!r}, which is unknown. {suggest(self.reference, artifacts)}"
            )
        return subject_of(artifacts[self.reference], device)

    def _measured(
        self, subject: Subject, tokenizer: Any, split: Split, reference: Subject | None, advance: Advance
    ) -> dict[str, Any]:
        quality: Record = {}
        conditions: Record = {"split": split.name, "batch": self.batch, "dtype": "float32", "runtime": subject.runtime}
        if split.truncated:
            conditions["rows_cut"] = f"{split.truncated} of {len(split)}"
        if split.blank:
            conditions["rows_empty"] = f"{split.blank} of {len(split)}"
        if "perplexity" in self.metric:
            quality |= perplexity(subject, split, self.batch, advance)
        if reference is not None:
            quality |= agreement(subject, reference, split, self.batch, advance)
            conditions["reference"] = self.reference
        if self._texts:
            scores, details = self._generated(subject, tokenizer, split, advance)
            quality |= scores
            conditions |= details
        return {"quality": quality, "conditions": {"quality": conditions}}

    def _generated(self, subject: Subject, tokenizer: Any, split: Split, advance: Advance) -> tuple[Record, Record]:
        if tokenizer is None:
            raise DataError(f"quality: {self._texts[0]} compares text, but the model has no tokenizer")
        runs: list[dict[str, float]] = []
        texts: list[str] = []
        signatures: dict[str, str] = {}
        for seed in self.decoding.runs:
            said = response_texts(subject, tokenizer, split, self.decoding, self.batch, seed, advance)
            texts = [answer.text for answer in said]
            found = self._scores(said, split)
            signatures = {name: scores.pop("signature") for name, scores in found.items()}
            runs.append({key: value for scores in found.values() for key, value in scores.items()})
        conditions: Record = {"rows": len(texts), "decoding": self.decoding.conditions(), "signatures": signatures}
        if len(runs) > 1:
            drawn = [key for key in runs[0] if not key.startswith("reference_")]
            conditions["std"] = {key: statistics.stdev(run[key] for run in runs) for key in drawn}
        means: Record = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
        return means | {"samples": samples(split.examples, texts)}, conditions

    def _scores(self, said: Sequence[Response], split: Split) -> dict[str, Record]:
        from compress.measure import metrics  # imports `evaluate`, which takes seconds

        options: dict[str, Record] = {
            "rouge": {"sentences": self.sentences},
            "bleu": {"tokenize": self.bleu_tokenize},
            "length": {"full": [answer.full for answer in said]},
        }
        texts, references = [answer.text for answer in said], [example.references for example in split.examples]
        scores: dict[str, Record] = {
            name: metrics.score(name, texts, references, **options.get(name, {})) for name in self._texts
        }
        if self.bleu_tokenize != "13a":  # scores with different tokenizers cannot be compared
            found, name = scores.pop("bleu"), f"bleu_{self.bleu_tokenize}"
            scores[name] = {name: found["bleu"], "signature": found["signature"]}
        return scores


def _check_letters(split: Split) -> None:
    """Reject references if more than half of the rows have letters but none from a to z, which ROUGE would ignore.

    Digits alone, which ROUGE still sees, are not enough to score such rows.
    """
    rows = [set("".join(example.references).lower()) for example in split.examples]
    lost = sum(any(map(str.isalpha, row)) and row.isdisjoint(string.ascii_lowercase) for row in rows)
    if lost > len(rows) / 2:
        raise DataError(
            f"quality: ROUGE only counts the letters a to z, but {lost} of {len(rows)} rows of {split.name} have "
            "references without one; measure chrf or bleu"
        )
