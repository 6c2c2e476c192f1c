"""Quality of models: perplexity, agreement with a reference model, and metrics of generated text."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from rich.console import Console

from compress.artifact import Artifact
from compress.data import Data, Split
from compress.errors import DataError, RecipeError, UserError, located
from compress.generation.responses import Response, response_texts, samples
from compress.generation.settings import Decoding
from compress.generation.subject import Subject, subject_of
from compress.measure.measurement import Measurement
from compress.measure.metrics.bleu import Tokenizer
from compress.measure.metrics.imported import NOT_CACHED, Imported, cached_script
from compress.measure.metrics.metric import Metric
from compress.measure.scores import Values, checked, declared, is_number, joined
from compress.problem import Problem
from compress.registry import METRICS, suggest
from compress.schema import added
from compress.training.progress import Advance, counting


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str | Mapping | Imported) else value


def read_metric(value: object) -> object:
    """Return the name of a registered metric, or else a metric of ``evaluate``. Raise ValueError if it is unknown."""
    if isinstance(value, Mapping):
        return Imported.model_validate(value)
    if isinstance(value, Imported) or value in METRICS.names():
        return value
    if not isinstance(value, str):
        raise ValueError(f"unknown metric {value!r}; give a name or {{path: FILE}}. {suggest('', METRICS.names())}")
    if cached_script(value) is None:
        raise ValueError(f"unknown metric {value!r}. {suggest(value, METRICS.names())}. {NOT_CACHED}")
    return Imported(name=value)


Named = Annotated[str | Imported, BeforeValidator(read_metric)]


class Quality(Measurement):
    """Quality of torch and ONNX artifacts, measured by the same code in float32.

    ``perplexity`` and ``agreement`` (with ``reference``) read the logits of given tokens. The other metrics compare
    generated text with all references. ``compress-lm describe NAME`` explains each metric. Other packages add
    metrics, and those of the ``evaluate`` library are given as ``{path: FILE}`` or by name.
    """

    type: Literal["quality"] = "quality"
    metric: Annotated[tuple[Named, ...], BeforeValidator(_listed), Field(min_length=1)] = ("perplexity",)
    """One metric, or several: names that ``compress-lm list`` shows, or metrics of ``evaluate``."""
    split: Literal["test", "eval"] = "test"
    """The split to measure on. If a run has no such split, the other one is used, and the conditions name it."""
    batch: int = Field(8, ge=1)
    """Rows per batch."""
    sentences: Literal["lines", "stops"] = "lines"
    """Sentence ends for ROUGE-Lsum: line breaks, or also . ! ? before a blank ("Mr. Smith" then splits)."""
    bleu_tokenize: Tokenizer = added("13a")
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
        metrics = {name: METRICS.get(name) for name in (*METRICS.builtin, *self.metric) if isinstance(name, str)}
        for name, field in type(self).model_fields.items():
            takers = [metric for metric in metrics if name in metrics[metric].takes]
            taken, given = any(metric in self.metric for metric in takers), getattr(self, name) != field.default
            listed = " or ".join(takers)
            if takers and name == "reference" and taken != given:
                raise ValueError(
                    f"metric {listed} needs reference, the model to compare with, and reference needs metric {listed}"
                )
            if takers and given and not taken:
                raise ValueError(
                    f"{name}: {getattr(self, name)} applies only to the {listed} metric, which metric does not include"
                )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        origins = dict(zip(self.called, self.metric, strict=True))
        for name, metric in zip(self.called, self.metric, strict=True):
            if self.metric.count(metric) > 1:
                raise ValueError(f"metric: {name!r} is named twice")
            if origins[name] != metric:
                raise ValueError(f"metric: two metrics are called {name!r}; rename a script")
        return self

    @property
    def unread(self) -> frozenset[str]:
        named = [METRICS.get(each) for each in self.metric if isinstance(each, str)]
        taken = {field for metric in named for field in metric.takes}
        optional = {field for name in METRICS.builtin for field in METRICS.get(name).takes} & set(
            type(self).model_fields
        )
        text = len(named) < len(self.metric) or any(metric.reads == "text" for metric in named)
        return frozenset((optional - taken) | (set() if text else {"decoding"}))

    @property
    def compared_with(self) -> tuple[str, ...]:
        return (self.reference,) if self.reference else ()

    @property
    def depends_on(self) -> dict[str, str]:
        here = self.recipe_directory
        with located(self.type):
            scripts = {each.called: each.content(here) for each in self.metric if isinstance(each, Imported)}
        versions = {each: METRICS.get(each).version for each in self.metric if isinstance(each, str)}
        return scripts | {name: f"version {version}" for name, version in versions.items() if version != 1}

    def metrics(self) -> dict[str, Metric]:
        """Return the metrics by name. Scripts among them are run."""
        here = self.recipe_directory
        found = [each.opened(here) if isinstance(each, Imported) else METRICS.get(each) for each in self.metric]
        return dict(zip(self.called, found, strict=True))

    @property
    def called(self) -> list[str]:
        """The names of the metrics."""
        return [each.called if isinstance(each, Imported) else each for each in self.metric]

    def run(
        self, artifacts: Mapping[str, Artifact], *, data: Data | None, device: str, console: Console | None
    ) -> dict[str, dict[str, Any]]:
        with located(self.type):
            split, reference = self._split(data), self._reference(artifacts, device)
        records = {}
        for name, artifact in self.chosen(artifacts).items():
            if console is not None:
                console.print(f"quality of {name}: {', '.join(self.called)} on {split.name}", highlight=False)
            subject, tokenizer = subject_of(artifact, device), artifact.tokenizer()
            with located(self.type):
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
        """Measure one model on one split. ``console`` shows a progress bar with the title ``name``.

        The path of an error starts at a field of this measurement.
        """
        metrics = self.metrics()
        self._check(split, metrics)
        texts = _that_read("text", metrics)
        passes = len(metrics) - len(texts) + len(self.decoding.runs) * bool(texts)  # how often each row is read
        with counting(console, name, passes * len(split)) as advance:
            values = self._of_logits(_that_read("logits", metrics), subject, split, reference, advance)
            conditions = self._conditions(subject, split, reference)
            if texts:
                scores, details = self._of_texts(texts, subject, tokenizer, split, advance)
                values = joined({"logits": values, "generated text": scores})
                conditions |= details
        figures = declared(metrics, values)
        return {"quality": values, **({"figures": figures} if figures else {}), "conditions": {"quality": conditions}}

    def problems(self, configs: Mapping[str, Any], data: Data | None) -> Iterator[Problem]:
        try:
            self._split(data)
        except UserError as error:
            yield error.problem

    def _split(self, data: Data | None) -> Split:
        wanted = dict.fromkeys((self.split, "test", "eval"))
        found = [split for split in (getattr(data, name, None) for name in wanted) if isinstance(split, Split)]
        if not found:
            raise DataError(Problem(("split",), "the recipe has neither data.test nor data.eval"))
        self._check(found[0], self.metrics())
        return found[0]

    def _check(self, split: Split, metrics: Mapping[str, Metric]) -> None:
        """Raise DataError if a metric of generated text cannot be measured on a split."""
        texts = _that_read("text", metrics)
        if not texts:
            return
        if not split.examples:
            text = f"{next(iter(texts))} compares generated text with references, but {split.name} has none"
            raise DataError(Problem(("metric",), f"{text}; give prompt and response, or source and target"))
        references = [example.references for example in split.examples]
        for metric in texts.values():
            if reason := metric.problem(references, split.name):
                raise DataError(Problem(("metric",), reason))
        new, context, field = self.decoding.max_new_tokens, split.model.context, ("decoding", "max_new_tokens")
        if split.model.task == "seq2seq":
            if new > context:
                raise DataError(Problem(field, f"{new}, but the model's responses have at most {context} tokens"))
            return
        prompt = max(len(example.input_ids) for example in split.examples)
        if prompt + new > context:
            text = f"{new} after {prompt} tokens of {split.name} exceed the model's {context}"
            raise DataError(Problem(field, f"{text}; lower it, or cut prompts with data.max_source"))

    def _reference(self, artifacts: Mapping[str, Artifact], device: str) -> Subject | None:
        if self.reference is None:
            return None
        if self.reference not in artifacts:
            text = f"{self.reference!r} is unknown. {suggest(self.reference, artifacts)}"
            raise RecipeError(Problem(("reference",), text))
        return subject_of(artifacts[self.reference], device)

    def _conditions(self, subject: Subject, split: Split, reference: Subject | None) -> Values:
        conditions: Values = {"split": split.name, "batch": self.batch, "dtype": "float32", "runtime": subject.runtime}
        if split.truncated:
            conditions["rows_cut"] = f"{split.truncated} of {len(split)}"
        if split.blank:
            conditions["rows_empty"] = f"{split.blank} of {len(split)}"
        if reference is not None:
            conditions["reference"] = self.reference
        return conditions

    def _of_logits(
        self,
        metrics: Mapping[str, Metric],
        subject: Subject,
        split: Split,
        reference: Subject | None,
        advance: Advance,
    ) -> Values:
        found = {}
        for name, metric in metrics.items():
            result = metric.function(subject, split, self.batch, advance, **self._taken(metric, reference=reference))
            found[name], _ = checked(name, result)
        return joined(found)

    def _of_texts(
        self, metrics: Mapping[str, Metric], subject: Subject, tokenizer: Any, split: Split, advance: Advance
    ) -> tuple[Values, Values]:
        if tokenizer is None:
            raise DataError(
                Problem(("metric",), f"{next(iter(metrics))} compares text, but the model has no tokenizer")
            )
        runs: list[Values] = []
        texts: list[str] = []
        signatures: dict[str, str] = {}
        for seed in self.decoding.runs:
            said = response_texts(subject, tokenizer, split, self.decoding, self.batch, seed, advance)
            texts = [answer.text for answer in said]
            found, signatures = self._scores(metrics, said, split)
            runs.append(found)
        conditions: Values = {"rows": len(texts), "decoding": self.decoding.conditions(), "signatures": signatures}
        if len(runs) > 1:
            fixed = {key for each in metrics.values() for key, figure in each.figures.items() if figure.condition}
            drawn = [key for key in runs[0] if key not in fixed]
            conditions["std"] = {key: statistics.stdev(run[key] for run in runs) for key in drawn}
        means: Values = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
        return means | {"samples": samples(split.examples, texts)}, conditions

    def _scores(
        self, metrics: Mapping[str, Metric], said: Sequence[Response], split: Split
    ) -> tuple[Values, dict[str, str]]:
        """Return the values of all metrics, and the signature of each metric that has one."""
        texts, references = [answer.text for answer in said], [example.references for example in split.examples]
        full = [answer.full for answer in said]
        scores: dict[str, Values] = {}
        signatures: dict[str, str] = {}
        for name, metric in metrics.items():
            values, signature = checked(name, metric.function(texts, references, **self._taken(metric, full=full)))
            scores[name] = {key: float(value) for key, value in values.items() if is_number(value)}
            if signature:  # the signature of a single value has its name, which may contain settings, as in bleu_zh
                signatures[next(iter(scores[name])) if len(scores[name]) == 1 else name] = signature
        return joined(scores), signatures

    def _taken(self, metric: Metric, **given: Any) -> dict[str, Any]:
        """Return the further arguments of a metric's function."""
        return {name: given[name] if name in given else getattr(self, name) for name in metric.takes}


def _that_read(what: str, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    return {name: metric for name, metric in metrics.items() if metric.reads == what}
