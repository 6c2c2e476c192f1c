"""llama.cpp (``llama-cpp-python`` and ``gguf`` in requirements-peers.txt): GPT-2 in Q4_0, Q2_K and TQ2_0."""

import importlib.util
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from contender import Contender, Run, Skipped, finished, fresh_process

from compress.measure.workload import Workload, timed_pass

KINDS = {"Q4_0": 2, "Q2_K": 10, "TQ2_0": 37}
"""Numbers of llama.cpp's file types."""
NAMES = tuple(f"llama.cpp-{kind}" for kind in KINDS)
BLOCK = 256
"""Weights that Q2_K and TQ2_0 quantize together."""
PARTS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
"""Modules of a GPT-2 layer, and what a GGUF file calls them."""
OUTER = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm"}


def llama_peers(source: Path, root: Path, threads: int, width: int) -> Iterator[Contender]:
    """Write the float32 file, quantize it, open each kind."""
    for package in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"{package.replace('llama_cpp', 'llama-cpp-python')} is not installed")
    if "GPT2" not in (source / "config.json").read_text():
        raise Skipped("llama.cpp does not support BART")
    if width % BLOCK:
        raise Skipped(f"Q2_K and TQ2_0 need widths that are multiples of {BLOCK}, not {width}")
    whole = root / "llama.cpp-F32"
    finished(whole, partial(_write, source))
    for name, number in zip(NAMES, KINDS.values(), strict=True):
        directory = root / name
        facts = finished(directory, partial(_quantize, whole / "model.gguf", number))
        yield Contender(
            name=directory.name,
            files=(directory / "model.gguf",),
            open=partial(opener, str(directory), str(threads)),
            fresh=lambda work, directory=directory: fresh_process("llama_peer", work, directory, threads),
            facts=facts,
        )


def _write(source: Path, out: Path) -> dict[str, Any]:
    """A float32 GGUF file; a tied head is left out, as llama.cpp then takes the embedding."""
    from gguf import GGUFWriter

    from compress.artifact import adopt

    model: Any = adopt(source).model()
    config = model.config
    start = time.perf_counter()
    writer = GGUFWriter(str(out / "model.gguf"), "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in model.named_parameters():
        place, part = name.rsplit(".", 1)
        turned = tensor.T if ".c_" in place and tensor.ndim == 2 else tensor  # stored [in, out] by the stock class
        writer.add_tensor(f"{_renamed(place)}.{part}", turned.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"export_s": time.perf_counter() - start}


def _renamed(place: str) -> str:
    if place in OUTER:
        return OUTER[place]
    _, _, layer, part = place.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}"


def _quantize(source: Path, number: int, out: Path) -> dict[str, Any]:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = number
    start = time.perf_counter()
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(out / "model.gguf").encode(), settings)
    if failed:
        raise Skipped(f"llama.cpp could not quantize to type {number} (code {failed})")
    return {"quantize_s": time.perf_counter() - start}


class Stepper:
    """Greedy decoding by ``Llama.eval``; the last logits are read where llama.cpp keeps them."""

    runtime = "llama.cpp"

    def __init__(self, directory: Path, threads: int) -> None:
        from llama_cpp import Llama

        self._llama = Llama(
            str(directory / "model.gguf"), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def prefill(self, ids: Any, new_tokens: int) -> None:
        self._llama.reset()
        self._feed(ids[0].tolist())

    def step(self) -> None:
        self._feed([self._token])

    def _feed(self, tokens: list[int]) -> None:
        import llama_cpp
        import numpy as np

        self._llama.eval(tokens)
        found = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        self._token = int(np.ctypeslib.as_array(found, shape=(self._llama.n_vocab(),)).argmax())


def opener(directory: str, threads: str) -> Run:
    stepper = Stepper(Path(directory), int(threads))

    def run(work: Workload) -> Any:
        return timed_pass(stepper, work)

    return run
