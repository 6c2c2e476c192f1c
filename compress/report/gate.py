"""The gate of quantized exports: which are no faster than the float export of the same run, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from compress.report.formats import megabytes, number, ratio
from compress.report.numbers import Row, rows_of, unquantized
from compress.report.read import read

SMALL_MODEL = 5_000_000
"""Below about this many parameters a step's time goes to calling kernels rather than to multiplying."""

FAST_BLOCKS = (32, 64, 128)
"""Block sizes for which ONNX Runtime has a fast low-bit kernel on CPU."""

DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
"""Instructions that multiply and add 8-bit numbers at once."""

Reasons = Callable[[Row, Row], Iterator[str]]


def slow_exports(workdir: Path) -> list[str]:
    """A line for each quantized export of a run that is no faster than the float one, per token or at a prompt."""
    return list(slow(rows_of([read(workdir)])))


def slow(rows: Sequence[Row]) -> Iterator[str]:
    """As :func:`slow_exports`, of artifacts that were read already."""
    for row in rows:
        base = unquantized(rows, row)
        if row.onnx and row.manifest.quantization and base is not None:
            yield from _compared(row, base, "per token", row.per_token, base.per_token, _per_token)
            yield from _compared(row, base, "at a prompt", row.prefill, base.prefill, _at_a_prompt)


def _compared(
    row: Row, base: Row, where: str, time: float | None, float_time: float | None, reasons: Reasons
) -> Iterator[str]:
    if time and float_time and time >= float_time:
        what = f"{row.label} is quantized but no faster {where} than {base.label} ({ratio(float_time / time)})"
        found = _unpacked(row) or (*_of_products(row), *reasons(row, base))
        why = "; ".join(found) or "nothing recorded explains it"
        yield f"{what}: {number(time)} against {number(float_time)} ms; {why}."


def _unpacked(row: Row) -> tuple[str, ...]:
    """Why products of float32 inputs with codes that have no such kernel are no faster: they are float products."""
    bits = {matrix.get("bits") for matrix in _matrices(row)} - {3, 4} if row.weight_only else set()
    if not bits:
        return ()
    return (f"its {_listed(bits)}-bit codes become float32 weights when it is opened, which cost what any others do",)


def _of_products(row: Row) -> Iterator[str]:
    if row.weight_only:
        yield "its products have float32 inputs, for which codes are turned into float32 numbers at each use"
        return
    if blocks := {matrix["block"] for matrix in _matrices(row) if matrix.get("block")} - set(FAST_BLOCKS):
        yield f"its block size {_listed(blocks)} has no fast kernel; {_listed(FAST_BLOCKS)} have"
    instructions = row.run.environment.get("instructions")
    if instructions is not None and not DOT_PRODUCTS & set(instructions):
        yield "this processor has no dot products of 8-bit numbers (VNNI, AMX or DotProd)"


def _per_token(row: Row, base: Row) -> Iterator[str]:
    if row.record.parameters is not None and row.record.parameters < SMALL_MODEL:
        yield "at this size a step's time goes to calling kernels, not to reading weights"
    cache = row.run.environment.get("cache_bytes")
    if cache and base.record.bytes and base.record.bytes <= cache:
        sizes = f"{megabytes(base.record.bytes)} of {megabytes(cache)} MB"
        yield f"{base.label} fits into the processor's cache ({sizes}), so that reading fewer bytes saves little"


def _at_a_prompt(row: Row, base: Row) -> Iterator[str]:
    yield "its tokens share one reading of the weights, so that fewer bytes save little and unpacking them costs time"
    if not row.weight_only and any(matrix.get("bits") == 2 for matrix in _matrices(row)):
        yield "the kernel of 2-bit codes takes longer there than those of 4 and 8 bits"


def _matrices(row: Row) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (row.manifest.quantization or {}).get("matrices", [])
    return found


def _listed(values: Any) -> str:
    return ", ".join(map(str, sorted(values)))
