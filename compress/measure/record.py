"""The record of one artifact: everything that was measured of it, in the form of its JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compress.measure.figures import figure_of
from compress.measure.metrics.metric import Figure
from compress.measure.scores import is_number


class View(BaseModel):
    """The known part of a JSON object. Unknown keys are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Percentiles(View):
    """Percentiles of a time in milliseconds, over the repeats of one measurement."""

    p50: float
    p95: float | None = None


class Speed(View):
    """The results of the ``speed`` measurement for one artifact."""

    prefill_ms: Percentiles | None = None
    per_token_ms: Percentiles | None = None
    tokens_per_s: float | None = None
    load_s: float | None = None
    peak_rss_bytes: int | None = None
    weight_bytes_per_token: int | None = None
    floor_ms: float | None = None
    above_floor: float | None = None
    faster: dict[str, float] = Field(default_factory=dict)
    """How many times as fast as the first artifact of the same timing run, for ``prefill`` and ``per_token``."""

    @property
    def timed(self) -> bool:
        """Whether any time was taken."""
        return self.prefill_ms is not None or self.per_token_ms is not None


class Record(View):
    """All measurements of one artifact. A measurement that did not run leaves its fields empty."""

    name: str
    path: str = ""
    key: str = ""
    """Key of the artifact and of the data as it was read, which the numbers belong to."""
    parameters: int | None = None
    bytes: int | None = None
    bytes_total: int | None = None
    compression_ratio: float | None = None
    compression_ratio_fp16: float | None = None
    quality: dict[str, Any] = Field(default_factory=dict)
    figures: dict[str, Figure] = Field(default_factory=dict)
    """A dict from value name to its label, direction and order, for metrics that are not built in."""
    speed: Speed = Speed()
    conditions: Any = None

    @property
    def scores(self) -> dict[str, float]:
        """The values of ``quality`` in their declared order. Values of equal order stay in the order of measurement."""
        found = {
            key: (figure, float(value))
            for key, value in self.quality.items()
            if is_number(value)
            if not (figure := figure_of(key, self.figures)).condition
        }
        ordered = sorted(found.items(), key=lambda item: item[1][0].order)
        return {key: value for key, (_, value) in ordered}


def scored(records: Iterable[Record]) -> dict[str, Figure]:
    """Return a dict from each metric value that some record has to its declaration."""
    records = list(records)
    declared = {key: figure for record in records for key, figure in record.figures.items()}
    return {key: figure_of(key, declared) for record in records for key in record.scores}
