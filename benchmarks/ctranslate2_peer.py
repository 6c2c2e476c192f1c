"""CTranslate2 (``ctranslate2`` in requirements-peers.txt): float32 and int8, converted from the stock directory."""

import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from contender import Contender, Run, Skipped, finished, fresh_process

from compress.measure.workload import Times, Workload

KINDS = {"float32": None, "int8": "int8"}
"""Compute type, and what the converter calls it."""
INT8 = "ctranslate2-int8"


def ctranslate2_peers(source: Path, root: Path, threads: int) -> Iterator[Contender]:
    """Convert and open both kinds."""
    if importlib.util.find_spec("ctranslate2") is None:
        raise Skipped("ctranslate2 is not installed")
    for kind, quantization in KINDS.items():
        directory = root / f"ctranslate2-{kind}"
        facts = finished(directory, partial(_convert, source, quantization))
        yield Contender(
            name=directory.name,
            files=(directory / "model.bin",),
            open=partial(opener, str(directory), str(threads), kind),
            fresh=lambda work, place=directory, kind=kind: fresh_process(
                "ctranslate2_peer", work, place, threads, kind
            ),
            facts=facts,
        )


def _convert(source: Path, quantization: str | None, out: Path) -> dict[str, Any]:
    from ctranslate2.converters import TransformersConverter

    named = out.with_name(f"{out.name}.source")
    shutil.copytree(source, named, dirs_exist_ok=True)
    _name_tokens(named)
    start = time.perf_counter()
    TransformersConverter(str(named)).convert(str(out), quantization=quantization, force=True)
    shutil.rmtree(named)
    return {"export_s": time.perf_counter() - start}


def _name_tokens(directory: Path) -> None:
    """The converter reads a tokenizer, and a field that published BART configs hold; token i is called ``t<i>``."""
    from tokenizers import Tokenizer, models

    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "normalize_before": False}))
    words = models.WordLevel({f"t{token}": token for token in range(config["vocab_size"])}, unk_token="t3")
    Tokenizer(words).save(str(directory / "tokenizer.json"))
    special = {"bos_token": "t0", "pad_token": "t1", "eos_token": "t2", "unk_token": "t3"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def opener(directory: str, threads: str, kind: str) -> Run:
    """A pass is one call that decodes greedily to a given length; a callback marks the time of each token."""
    import ctranslate2

    decoder_alone = (Path(directory) / "vocabulary.json").exists()
    opened = ctranslate2.Generator if decoder_alone else ctranslate2.Translator
    model = opened(directory, compute_type=kind, intra_threads=int(threads))

    def run(work: Workload) -> Times:
        prompts = [[f"t{token}" for token in row] for row in work.ids().tolist()]
        marks = [time.perf_counter()]

        def mark(_: Any) -> bool:
            marks.append(time.perf_counter())
            return False  # true would end the text

        _generate(model, prompts, work.new_tokens + 1, mark)
        spent = [later - earlier for earlier, later in pairwise(marks)]
        return Times(spent[0], tuple(spent[1:]))

    return run


def _generate(model: Any, prompts: list[list[str]], length: int, mark: Callable[[Any], bool]) -> None:
    if type(model).__name__ == "Generator":
        model.generate_batch(
            prompts, max_length=length, min_length=length, include_prompt_in_result=False, callback=mark
        )
    else:
        model.translate_batch(
            prompts, beam_size=1, max_decoding_length=length, min_decoding_length=length, callback=mark
        )
