"""Find quantized exports that are not faster than the float export of the same run, and explain why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from compress.measure.formats import megabytes, number, ratio
from compress.report.numbers import Row, rows_of, unquantized
from compress.report.read import read

SMALL_MODEL = 5_000_000
"""Below about this many parameters, a step spends its time on kernel calls rather than on multiplication."""

FAST_BLOCKS = (32, 64, 128)
"""Block sizes for which ONNX Runtime has a fast low-bit kernel on CPU."""

TIE = 0.02
"""Medians that differ by at most this share are reported as a tie."""

FLOAT_KERNEL_BITS = frozenset({3, 4})
"""Bits of codes (3 bits are stored in 4) for which a kernel multiplies float32 inputs without unpacking."""

DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
"""Instructions that multiply and add 8-bit numbers at once."""

Reasons = Callable[[Row, Row, Sequence[Row]], Iterator[str]]


def slow_exports(workdir: Path) -> list[str]:
    """Return a line for each quantized export of a run that is not faster than the float one, per token or at a prompt.

    An export that is equally fast to within ``TIE`` is reported as such. The reasons come from the records of the
    artifact and the machine.
    """
    return list(slow(rows_of([read(workdir)])))


def slow(rows: Sequence[Row]) -> Iterator[str]:
    """Like :func:`slow_exports`, for artifacts that were already read."""
    for row in rows:
        base = unquantized(rows, row)
        if row.onnx and row.manifest.quantization and base is not None:
            pairs = {"per token": (row.per_token, base.per_token), "at a prompt": (row.prefill, base.prefill)}
            for (where, (time, float_time)), reasons in zip(pairs.items(), (_per_token, _at_a_prompt), strict=True):
                if time and float_time and time >= float_time * (1 - TIE):
                    yield _sentence(row, base, where, time, float_time, _why(row, base, rows, reasons))


def _sentence(row: Row, base: Row, where: str, time: float, float_time: float, why: Sequence[str]) -> str:
    compared = f"no faster {where} than {base.label}"
    if time <= float_time * (1 + TIE):
        compared = f"as fast {where} as {base.label}, to within {100 * TIE:.0f} %"
    times = f"({ratio(float_time / time)}): {number(time)} ms compared with {number(float_time)} ms"
    return f"{row.label} is quantized but {compared} {times}; {'; '.join(why) or 'the records do not explain why'}."


def _why(row: Row, base: Row, rows: Sequence[Row], reasons: Reasons) -> list[str]:
    unpacked = _unpacked(row)
    if unpacked == {product.get("bits") for product in row.products}:
        return [*_of_floats(unpacked)]
    return [*_of_floats(unpacked), *_of_products(row), *reasons(row, base, rows)]


def _unpacked(row: Row) -> set[Any]:
    """Return the bits of codes without a kernel for float32 inputs. Their linear layers are computed in float."""
    return {product.get("bits") for product in row.products} - FLOAT_KERNEL_BITS if row.weight_only else set()


def _of_floats(bits: set[Any]) -> Iterator[str]:
    if bits:
        yield f"its {_listed(bits)}-bit codes become float32 weights when it is opened, which are as slow as any others"


def _of_products(row: Row) -> Iterator[str]:
    if row.weight_only:
        yield "its linear layers have float32 inputs, so codes are converted to float32 numbers at each use"
        return
    if blocks := {product["block"] for product in row.products if product.get("block")} - set(FAST_BLOCKS):
        yield f"its block size {_listed(blocks)} has no fast kernel; only {_listed(FAST_BLOCKS)} have one"
    instructions = row.run.environment.get("instructions")
    if instructions is not None and not DOT_PRODUCTS & set(instructions):
        yield "this processor has no dot products of 8-bit numbers (VNNI, AMX or DotProd)"


def _per_token(row: Row, base: Row, rows: Sequence[Row]) -> Iterator[str]:
    if row.record.parameters is not None and row.record.parameters < SMALL_MODEL:
        yield "at this size a step spends its time on kernel calls, not on reading weights"
    cache = row.run.environment.get("cache_bytes")
    if cache and base.record.bytes and base.record.bytes <= cache:
        sizes = f"{megabytes(base.record.bytes)} of {megabytes(cache)} MB"
        yield f"{base.label} fits into the processor's cache ({sizes}), so reading fewer bytes saves little"


def _at_a_prompt(row: Row, base: Row, rows: Sequence[Row]) -> Iterator[str]:
    reading = _reading(base)
    if reading is not None and base.prefill and reading <= base.prefill / 2:
        times = f"{number(reading)} of its {number(base.prefill)} ms"
        yield f"reading all weights of {base.label} from memory takes {times}, so fewer bytes save little"
    if (faster := next(_more_bits(row, rows), None)) is not None:
        bits = _listed({product.get("bits") for product in faster.products})
        yield f"matrix products of {bits}-bit codes are faster there ({faster.label}: {number(faster.prefill)} ms)"


def _reading(row: Row) -> float | None:
    """Return the milliseconds it takes to read every byte of the model files at the measured memory bandwidth."""
    speed, size = row.record.speed, row.record.bytes
    if size is None or speed.floor_ms is None or not speed.weight_bytes_per_token:
        return None
    return size / speed.weight_bytes_per_token * speed.floor_ms


def _more_bits(row: Row, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield exports of the run with as many parameters as ``row`` and more bits per code that read a prompt faster."""
    for other in rows:
        alike = other.run is row.run and other.onnx and other.record.parameters == row.record.parameters
        if not (alike and row.products and other.products) or other.weight_only or row.weight_only:
            continue
        more = min(each.get("bits", 0) for each in other.products) > max(each.get("bits", 0) for each in row.products)
        if more and other.prefill and row.prefill and other.prefill < row.prefill * (1 - TIE):
            yield other


def _listed(values: Any) -> str:
    return ", ".join(map(str, sorted(values)))
