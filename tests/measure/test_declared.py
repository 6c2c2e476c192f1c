"""What metrics declare of their figures: every figure that a built-in one returns, and what readers see of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.artifact import Artifact
from compress.errors import CompressError, RecipeError
from compress.measure import metrics
from compress.measure.columns import Measured, columns, laid_out
from compress.measure.figures import figure_of, name_of
from compress.measure.metrics.metric import Figure, Metric
from compress.measure.quality import Quality
from compress.measure.record import Record
from compress.measure.scores import checked, joined
from compress.measure.table import records_table
from compress.registry import METRICS

from .conftest import data_of

TEXT = {"text": "lines.txt"}
PAIRS = {"json": "rows.jsonl", "prompt": "question", "response": "answer"}

LOWER = {
    "perplexity", "word_perplexity", "bits_per_byte", "bits_per_character", "kl", "empty", "full_length"
}  # fmt: skip
HIGHER = {
    "agreement", "bleu", "bleu_intl", "bleu_zh", "bleu_char", "bleu_none", "chrf", "rouge1", "rouge2", "rougeL",
    "rougeLsum", "exact_match", "distinct1", "distinct2", "distinct3",
}  # fmt: skip
NEITHER = {"words_mean", "words_median", "length_ratio"}
CONDITIONS = {"tokens", "words", "context", "stride", "reference_words_mean", "reference_words_median"}

LABELS = {
    "perplexity": "perplexity", "word_perplexity": "word perplexity", "bleu": "BLEU", "bleu_zh": "BLEU zh",
    "chrf": "chrF", "rougeLsum": "ROUGE-Lsum", "words_mean": "mean words", "distinct2": "distinct-2",
    "full_length": "full length %", "empty": "empty %", "kl": "kl", "rougeL (num_beams 4)": "ROUGE-L (num_beams 4)",
    "my_figure (split eval)": "my figure (split eval)",
}  # fmt: skip


def built_in() -> dict[str, Figure]:
    return {key: figure for name in METRICS.builtin for key, figure in METRICS.get(name).figures.items()}


def test_directions() -> None:
    """A direction that is turned around draws the wrong front, so each one stands here a second time."""
    found: dict[Any, set[str]] = {"lower": set(), "higher": set(), None: set(), "condition": set()}
    for key, figure in built_in().items():
        found["condition" if figure.condition else figure.better].add(key)
    assert found == {"lower": LOWER, "higher": HIGHER, None: NEITHER, "condition": CONDITIONS}
    assert figure_of("perplexity (split eval)").better == "lower"
    assert figure_of("my_figure").better is None


@pytest.mark.parametrize(("key", "label"), LABELS.items())
def test_labels(key: str, label: str) -> None:
    assert name_of(key) == label


def test_places_of_figures_with_columns_differ() -> None:
    """So that the order of columns depends on nothing else. Figures that nobody declared come before lengths."""
    orders = {key: figure.order for key, figure in built_in().items() if not figure.condition}
    assert len(set(orders.values())) == len(orders)
    assert max(orders[key] for key in LOWER | HIGHER if key not in ("empty", "full_length")) < Figure().order
    assert min(orders[key] for key in NEITHER) > Figure().order
    assert min(orders, key=lambda key: orders[key]) == "perplexity"


@pytest.mark.parametrize("test", [TEXT, PAIRS], ids=["text", "pairs"])
def test_every_figure_that_is_returned_is_declared(gpt2: Artifact, folder: Path, test: Any) -> None:
    names = [name for name in METRICS.builtin if test is PAIRS or METRICS.get(name).reads == "logits"]
    quality = Quality.model_validate(
        {"metric": names, "reference": "base", "decoding": {"max_new_tokens": 4}, "batch": 2}
    )
    record = quality.run({"base": gpt2}, data=data_of(gpt2, folder, test=test), device="cpu", console=None)["base"]
    numbers = {key for key, value in record["quality"].items() if isinstance(value, int | float)}
    assert numbers <= set(built_in())
    assert "figures" not in record, "what is built in is looked up"
    for tokenizer in ("intl", "zh", "char", "none"):
        assert set(metrics.score("bleu", ["a"], [["a"]], bleu_tokenize=tokenizer)) - {"signature"} <= set(built_in())


def test_a_record_s_own_declaration_counts_first() -> None:
    own = {"vowels (split eval)": Figure(label="vowels %", better="lower", order=1), "bleu": Figure(label="my BLEU")}
    assert name_of("vowels (split eval)", own) == "vowels % (split eval)"
    assert figure_of("vowels", own).better == "lower"
    assert name_of("bleu", own) == "my BLEU"
    assert name_of("chrf", own) == "chrF"


QUALITY = {
    "words_mean": 7.5, "mine": 3.0, "bleu": 12.5, "perplexity": 54.88, "tokens": 900, "bits_per_byte": 1.25,
    "reference_words_mean": 8.0, "samples": [], "note": "x", "flag": True, "vowels": 40.0,
}  # fmt: skip
RECORD = {
    "name": "base", "parameters": 1_500_000, "bytes": 3 * 2**20, "compression_ratio": 2.0, "quality": QUALITY,
    "figures": {"vowels": {"label": "vowels %", "order": 15}},
    "speed": {"prefill_ms": {"p50": 2.0, "p95": 3.0}, "per_token_ms": {"p50": 1.0}, "load_s": 1.0},
}  # fmt: skip


def titles(*, detail: bool) -> list[str]:
    rows = [Measured("base", Record.model_validate(RECORD), change=0.05, faster=2.0)]
    return [title for title, _ in laid_out(rows, (each for each in columns(rows) if detail or not each.detail)).titles]


def test_the_columns_are_in_the_declared_order() -> None:
    speed = ["per token", "faster", "prefill"]
    scores = ["perplexity", "change", "bits per byte", "vowels %", "BLEU", "mine", "mean words"]
    assert titles(detail=True) == ["artifact", "parameters", "size", "smaller", *scores, *speed, "load"]
    scores.remove("bits per byte")
    assert titles(detail=False) == ["artifact", "parameters", "size", "smaller", *scores, *speed]


def test_the_terminal_has_the_columns_of_the_report_without_its_details() -> None:
    shown = records_table([RECORD, {"name": "[b]small[/b]"}])
    headers = [str(column.header) for column in shown.columns]
    assert headers[:3] == ["name\n", "parameters\n", "size\nMB"]
    names = [header.split("\n")[0] for header in headers[4:]]
    assert names == ["perplexity", "vowels %", "BLEU", "mine", "mean words", "per token", "prefill"]
    assert [column.justify for column in shown.columns] == ["left", *["right"] * (len(headers) - 1)]
    cells = {header.split("\n")[0]: list(column.cells) for header, column in zip(headers, shown.columns, strict=True)}
    assert [(str(name), name.style) for name in cells["name"]] == [("base", "bold"), ("[b]small[/b]", "bold")]
    assert cells["perplexity"] == ["54.88", "–"]
    assert cells["prefill"] == ["2.00 / 3.00", "–"]


def test_artifacts_of_which_nothing_was_measured_are_still_listed() -> None:
    shown = records_table([{"name": "one"}, {"name": "two"}])
    assert [str(cell) for cell in shown.columns[0].cells] == ["one", "two"]


@pytest.mark.parametrize("result", [{}, {"text": "a"}, {"flag": True, "list": [1.0]}, {"signature": "s"}])
def test_a_metric_without_a_number_is_told(result: dict[str, Any]) -> None:
    told = ", ".join(key for key in result if key != "signature") or "nothing"
    with pytest.raises(RecipeError, match=f"^metric: mine gives no number; it gives {told}$"):
        checked("mine", result)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_not_finite_is_told(value: float) -> None:
    with pytest.raises(CompressError, match=f"metric: mine gives {value} for b, which is not a finite number"):
        checked("mine", {"a": 1.0, "b": value})


def test_two_metrics_do_not_share_a_key() -> None:
    assert joined({"one": {"tokens": 3, "a": 1.0}, "two": {"tokens": 3, "b": 2.0}}) == {"tokens": 3, "a": 1.0, "b": 2.0}
    with pytest.raises(RecipeError, match="metric: one and two both give 'a'; measure them apart"):
        joined({"one": {"a": 1.0}, "two": {"a": 2.0}})


def answered(texts: Any, references: Any, *, sentences: str) -> dict[str, Any]:
    """How many texts there are."""
    return {"answered": len(texts), "rule": sentences}


def confident(subject: Any, split: Any, batch: int, advance: Any, *, reference: Any) -> dict[str, Any]:
    """Whether a model is its own reference."""
    advance(len(split))
    return {"confident": 1.0 if reference is not None else 0.0, "seen": len(split)}


ANSWERED = Metric(answered, {"answered": Figure(label="answers", better="higher")}, takes=("sentences",), version=2)
CONFIDENT = Metric(
    confident, {"confident": Figure(order=1), "seen": Figure(condition=True)}, reads="logits", takes=("reference",)
)


def test_a_metric_of_a_plug_in_is_measured_and_described(
    gpt2: Artifact, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def point(name: str) -> Any:
        return type("Point", (), {"load": staticmethod(lambda: globals()[name])})

    monkeypatch.setitem(METRICS._plugins, "answered", point("ANSWERED"))
    monkeypatch.setitem(METRICS._plugins, "confident", point("CONFIDENT"))
    given = {"metric": ["confident", "answered"], "sentences": "stops", "decoding": {"max_new_tokens": 2}}
    with pytest.raises(ValueError, match="metric agreement or confident needs reference, the model to compare with"):
        Quality.model_validate(given)
    quality = Quality.model_validate({**given, "reference": "base"})
    assert quality.depends_on == {"answered": "version 2"}
    record = quality.run({"base": gpt2}, data=data_of(gpt2, folder, test=PAIRS), device="cpu", console=None)["base"]
    values = {key: value for key, value in record["quality"].items() if key != "samples"}
    assert values == {"confident": 1.0, "seen": 3, "answered": 3.0}
    assert record["figures"] == {
        "answered": {"label": "answers", "better": "higher"}, "confident": {"order": 1}, "seen": {"condition": True}
    }  # fmt: skip
    assert Record.model_validate({"name": "base", **record}).scores == {"confident": 1.0, "answered": 3.0}
