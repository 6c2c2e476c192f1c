"""Greedy decoding with optimum's three graphs of an encoder-decoder; needs numpy and onnxruntime alone."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from contender import Run
from ort_provider import PROVIDERS

from compress.measure.workload import timed_pass
from compress.onnx.runtime.opening import decoding_settings
from compress.onnx.runtime.session import bind_input, bind_output

ENCODER, FIRST, LATER = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"


class Stepper:
    """The caches stay onnxruntime's values, bound from one step to the next: nothing is copied to numpy but logits."""

    runtime = "onnxruntime"

    def __init__(self, directory: Path, threads: int, device: str = "cpu") -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        opened = partial(ort.InferenceSession, sess_options=options, providers=[PROVIDERS[device]])
        self._encoder, self._first, self._later = (opened(directory / name) for name in (ENCODER, FIRST, LATER))
        self._device = device
        self._start: int = decoding_settings(directory)["decoder_start_token_id"]
        self._vocabulary: int = self._first.get_outputs()[0].shape[-1]

    def prefill(self, ids: Any, new_tokens: int) -> None:
        mask = np.ones_like(ids)
        states = self._encoder.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        self._fixed = {"encoder_attention_mask": mask, "encoder_hidden_states": states}
        self._cache: dict[str, ort.OrtValue] = {}
        self._feed(self._first, np.full((len(ids), 1), self._start))

    def step(self) -> None:
        self._feed(self._later, self._tokens)

    def _feed(self, session: ort.InferenceSession, tokens: Any) -> None:
        binding = session.io_binding()
        asked = {each.name for each in session.get_inputs()}
        arrays = {"input_ids": tokens, **self._fixed}
        for name in asked & set(arrays):
            bind_input(binding, name, arrays[name])
        for name in asked & set(self._cache):
            binding.bind_ortvalue_input(name, self._cache[name])
        presents = [each.name for each in session.get_outputs() if each.name.startswith("present.")]
        for name in presents:
            binding.bind_output(name, self._device)
        logits = np.empty((*tokens.shape, self._vocabulary), np.float32)
        bind_output(binding, "logits", logits)
        session.run_with_iobinding(binding)
        values = binding.get_outputs()
        self._cache |= {f"past_key_values{name[7:]}": value for name, value in zip(presents, values, strict=False)}
        self._tokens = logits[:, -1].argmax(-1)[:, None]


def opener(directory: str, threads: str) -> Run:
    return partial(timed_pass, Stepper(Path(directory), int(threads)))
