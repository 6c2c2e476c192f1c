"""Targets that a teacher generates for the rows of ``data.train`` (sequence-level distillation)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from compress.artifact import TARGETS, Artifact
from compress.data.targets import prompts_of
from compress.errors import NothingDoneError
from compress.files import write_text
from compress.generation.journal import journaled
from compress.generation.settings import Generation
from compress.generation.subject import TorchSubject
from compress.models.stock_files import copy_settings
from compress.stages.stage import Context, Result, Stage
from compress.surgery.coverage import Coverage


class SeqKd(Stage):
    """Generate responses to the prompts or sources of the training data (Kim and Rush, 2016). The result holds rows,
    not a model.

    A stage that trains uses the responses as its targets with ``targets: NAME``. A row with an empty response is
    kept, and its target is only the end token. A response that does not end within ``max_new_tokens`` has no end token.
    """

    type: Literal["seq_kd"] = "seq_kd"
    decoding: Generation = Generation()
    """How responses are generated: greedily, by beam search, or sampled with the recipe's seed."""
    batch: int = Field(32, ge=1)
    """Rows per batch."""

    forbids: ClassVar[frozenset[str]] = frozenset({"masked", "onnx", "bitsandbytes"})
    takes: ClassVar[frozenset[str]] = frozenset({"pruned", "quantized"})
    gives: ClassVar[frozenset[str]] = frozenset({"targets"})
    version: ClassVar[int] = 2

    def run(self, source: Artifact, out: Path, context: Context) -> Result:
        name = self.name or self.type
        prompts = prompts_of(context.train(name))
        subject = TorchSubject.of(source, context.device)
        journal = out / "checkpoints"
        found = journaled(
            subject, prompts, self.decoding, self.batch, journal, name=name, seed=context.seed, bar=context.bar
        )
        copy_settings(source.path, out)
        write_text(out / TARGETS, "".join(_lines(prompts, found, subject.tokenizer)))
        special = {*subject.ends, *_special(subject.side.config)}
        empty = sum(special.issuperset(response) for response in found)
        if empty == len(found):
            raise NothingDoneError(f"{name}: all {empty} responses are empty; try another source or decoding")
        tokens = sum(map(len, found))
        cut = sum(response[-1] not in subject.ends for response in found)
        how = ", ".join(f"{name.removeprefix('num_')} {value}" for name, value in self.decoding.options().items())
        coverage = Coverage(
            modules_touched=len(found) - empty,
            modules_total=len(found),
            parameters_touched=tokens,
            parameters_total=tokens,
            bytes_before=0,
            bytes_after=0,
            note=f"rows in place of modules, tokens in place of parameters; {how}; {empty} empty, {cut} without an end",
        )
        metrics = {"rows": len(found), "tokens": tokens, "empty": empty, "without_end": cut}
        return Result(
            traits=self.traits_after(source.traits),
            coverage=coverage,
            metrics={key: float(n) for key, n in metrics.items()},
        )


def _lines(prompts: Sequence[list[int]], found: Sequence[list[int]], tokenizer: Any) -> list[str]:
    lines = []
    for prompt, response in zip(prompts, found, strict=True):
        row: dict[str, Any] = {"source": prompt, "target": response}
        if tokenizer is not None:  # the text is only for readers; training uses the tokens
            row["text"] = tokenizer.decode(response, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return lines


def _special(config: Any) -> set[int]:
    names = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
    return {token for name in names if isinstance(token := getattr(config, name, None), int)}
