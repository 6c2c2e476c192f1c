"""What tests of stages and of the Python API share.

A base artifact, data that can be learnt, and a stage run as the pipeline runs it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.artifact import Artifact, Step, adopt, seal
from compress.data import Data, DataSpec, ModelInterface, open_data
from compress.registry import STAGES
from compress.stages.stage import Context, Shape, Stage


@pytest.fixture
def stock(tmp_path: Path) -> Callable[..., Artifact]:
    """Save a model as a stock directory and adopt it."""

    def save(model: Any, name: str = "base") -> Artifact:
        model.save_pretrained(tmp_path / name)
        return adopt(tmp_path / name)

    return save


@pytest.fixture
def learnable(tmp_path: Path) -> Callable[[Artifact], Data]:
    """Rows in which each token tells the next: it is one higher; for sequence-to-sequence models a copy task."""

    def read(artifact: Artifact) -> Data:
        interface = ModelInterface.of(artifact.config())
        rows: list[dict[str, list[int]]] = []
        for i in range(32):
            ids = [3 + (5 * i + j) % (interface.vocabulary - 3) for j in range(10)]
            rows.append({"ids": ids} | ({"labels": ids} if interface.task == "seq2seq" else {}))
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"json": "rows.jsonl", "input_ids": "ids"} | ({"labels": "labels"} if "labels" in rows[0] else {})
        spec = DataSpec.model_validate({"train": source, "eval": source})
        return open_data(spec, tokenizer=None, model=interface, base=tmp_path)

    return read


@pytest.fixture
def answered(tmp_path: Path) -> Callable[..., Data]:
    """Prompts (or sources) of many lengths, each with an answer that has nothing to do with it."""

    def read(artifact: Artifact, rows: int = 14) -> Data:
        interface = ModelInterface.of(artifact.config())
        lines = []
        for i in range(rows):
            prompt = [3 + (7 * i + j) % (interface.vocabulary - 3) for j in range(2 + i % 5)]
            answer = [3 + (i * j) % (interface.vocabulary - 3) for j in range(1 + i % 3)] + [interface.eos]
            if interface.task == "seq2seq":
                lines.append({"ids": prompt, "labels": answer})
            else:
                lines.append({"ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        (tmp_path / "answered.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        source = {"json": "answered.jsonl", "input_ids": "ids", "labels": "labels"}
        spec = DataSpec.model_validate({"train": source, "eval": source})
        return open_data(spec, tokenizer=None, model=interface, base=tmp_path)

    return read


@pytest.fixture
def run_stage(tmp_path: Path) -> Callable[..., Artifact]:
    """Run a stage, seal what it wrote and open it again; a second call with the same ``out`` continues the first."""

    def run(
        config: dict[str, Any],
        source: Artifact,
        *,
        data: Data | None = None,
        models: dict[str, Artifact] | None = None,
        out: str = "out",
        seed: int = 0,
    ) -> Artifact:
        stage: Stage = STAGES.read(config)
        partial = tmp_path / f".partial-{out}"
        partial.mkdir(exist_ok=True)
        result = stage.run(source, partial, Context(models or {"base": source}, data, seed=seed, bar=False))
        step = Step(
            stage=out,
            type=stage.type,
            version=stage.version,
            config=stage.model_dump(mode="json"),
            seed=seed,
            inputs={"source": source.digest},
            packages={},
            seconds=0.0,
            coverage=result.coverage.model_dump(),
            metrics=dict(result.metrics),
        )
        shutil.rmtree(partial / "checkpoints", ignore_errors=True)
        sealed = seal(
            partial, tmp_path / out, parent=source, traits=sorted(result.traits), step=step, kept=result.kept,
            layers=result.layers, quantization=result.quantization,
        )  # fmt: skip
        return adopt(sealed.path)

    return run


@pytest.fixture
def shape_of() -> Callable[..., Shape]:
    """What a check knows of an artifact before any work."""

    def shape(artifact: Artifact, name: str = "base", **known: Any) -> Shape:
        facts = {"root": name, "traits": artifact.traits, "layers": artifact.manifest.layers} | known
        return Shape(name, artifact.config(), artifact.sizes(), **facts)

    return shape
