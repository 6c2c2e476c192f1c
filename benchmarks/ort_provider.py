"""Greedy decoding of a decoder's graph on one of onnxruntime's providers, its cache kept on that device."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
from contender import Skipped
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
CARRYING = ("MatMulNBits", "GroupQueryAttention", "MultiHeadAttention")
"""Operators of a packed graph that carry its work; elsewhere than on the device they would be timed with its name."""
_REFUSED = (
    *(ort_errors.Fail, ort_errors.RuntimeException, ort_errors.NotImplemented),
    *(ort_errors.InvalidGraph, ort_errors.InvalidArgument, ort_errors.EPFail),
)


class Stepper:
    """Tokens go to the device and logits come back each step; keys and values stay there, a step longer each time."""

    runtime = "onnxruntime"

    def __init__(self, directory: Path, device: str, profile: Path | None = None) -> None:
        options = ort.SessionOptions()
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        options.log_severity_level = 3
        self._session = ort.InferenceSession(directory / "model.onnx", options, providers=[PROVIDERS[device]])
        self._device = device
        self._pasts = [each for each in self._session.get_inputs() if each.name.startswith("past_key_values.")]
        self._outputs = [each.name for each in self._session.get_outputs()]

    def profiled(self) -> list[dict[str, Any]]:
        """The events so far, of a stepper that was opened with ``profile``."""
        found: list[dict[str, Any]] = json.loads(Path(self._session.end_profiling()).read_text())
        return found

    def prefill(self, ids: Any, new_tokens: int) -> None:
        empty = {each.name: np.zeros((len(ids), each.shape[1], 0, each.shape[3]), np.float32) for each in self._pasts}
        self._cache = {name: ort.OrtValue.ortvalue_from_numpy(array, self._device, 0) for name, array in empty.items()}
        self._length = 0
        self._feed(ids)

    def step(self) -> None:
        self._feed(self.tokens)

    def _feed(self, ids: Any) -> None:
        batch, new = ids.shape
        self._length += new
        arrays = {
            "input_ids": np.ascontiguousarray(ids, np.int64),
            "attention_mask": np.ones((batch, self._length), np.int64),
            "position_ids": np.tile(np.arange(self._length - new, self._length), (batch, 1)),
        }
        binding = self._session.io_binding()
        for each in self._session.get_inputs():
            if each.name in arrays:
                binding.bind_cpu_input(each.name, arrays[each.name])
            else:
                binding.bind_ortvalue_input(each.name, self._cache[each.name])
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self._device)
        self._session.run_with_iobinding(binding)
        values = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        logits = values.pop("logits").numpy()
        self._cache = {name.replace("present", "past_key_values"): value for name, value in values.items()}
        self.tokens = logits[:, -1].argmax(-1)[:, None]


def require_placed(directory: Path, device: str) -> None:
    """Raise Skipped where the provider refuses a packed graph, or leaves to another what carries its work."""
    with TemporaryDirectory() as place:
        try:
            stepper = Stepper(directory, device, Path(place) / "profile")
            stepper.prefill(np.zeros((1, 1), np.int64), 0)
        except _REFUSED as error:
            raise Skipped(f"{PROVIDERS[device]} refuses it: {str(error).splitlines()[0]}") from None
        if found := elsewhere(stepper.profiled(), PROVIDERS[device]):
            raise Skipped("; ".join(found))


def elsewhere(events: list[dict[str, Any]], provider: str) -> list[str]:
    """The carrying operators of a profile that ran on another provider, and on which."""
    placed = {(each["args"].get("op_name"), each["args"].get("provider")) for each in events if "args" in each}
    return [f"{op} runs on {place}" for op, place in sorted(placed, key=str) if op in CARRYING and place != provider]
