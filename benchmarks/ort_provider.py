"""Greedy decoding of a decoder's plain float graph on one of onnxruntime's providers, its cache kept on that device."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


class Stepper:
    """Tokens go to the device and logits come back each step; keys and values stay there, a step longer each time."""

    runtime = "onnxruntime"

    def __init__(self, directory: Path, device: str) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(directory / "model.onnx", options, providers=[PROVIDERS[device]])
        self._device = device
        self._pasts = [each for each in self._session.get_inputs() if each.name.startswith("past_key_values.")]
        self._outputs = [each.name for each in self._session.get_outputs()]

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
