"""The machine and the packages that results were made with."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from compress.pipeline.keys import packages

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""CPU instructions that determine the speed of matrix products with packed weights."""


def environment(device: str) -> dict[str, Any]:
    """Return the facts about this machine that are recorded with every measured number."""
    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
    }
    if (flags := _reported("flags", "Features")) is not None:
        found["instructions"] = [each for each in INSTRUCTIONS if each in flags.split()]
    if cache := _cache_bytes():
        found["cache_bytes"] = cache
    return found | packages(frozenset({"onnx"}))


def _processor() -> str:
    return _reported("model name") or platform.processor() or platform.machine()


def _reported(*names: str) -> str | None:
    """Return the value that the system reports for its first processor under one of these names, or None."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(names) and ":" in line), None)


def _cache_bytes() -> int:
    """Return the size of the largest cache of the first processor. 0 if the system does not report it."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 2**10 for size in sizes if size.endswith("K")), default=0)
