"""The comparison of whole answers: every side answers the same lines with the same search."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compress.artifact import MANIFEST, Artifact

ROOT = Path(__file__).parents[2]
LINES = ["the cat sat", "a dog ran far and the cat sat on the mat", "the mat"]


def answers(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "answers.py", *map(str, options)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_both_runtimes_answer_the_same_lines(bart: Artifact, bart_onnx: Artifact, tmp_path: Path, batch: int) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(LINES) + "\n")
    graphs = tmp_path / "graphs"
    shutil.copytree(bart_onnx.path, graphs)
    (graphs / MANIFEST).write_text(bart_onnx.manifest.model_dump_json())
    short = ("--rows=2", "--beams=3", f"--batch={batch}", "--max-new-tokens=6", "--threads=1")
    done = answers(bart.path, graphs, "--lines", lines, *short)
    assert not done.returncode, done.stderr
    result = json.loads(done.stdout)
    torch_model, graph = result["models"].values()
    assert [torch_model["answered_by"], graph["answered_by"]] == ["transformers", "compress.onnx.runtime"]
    assert torch_model["tokens"] == graph["tokens"] > 2
    assert torch_model["times_as_fast"] == 1 and graph["times_as_fast"] > 0
    assert result["conditions"]["rows"] == 2


@pytest.mark.slow
def test_two_directories_of_one_name_are_reported(bart: Artifact, tmp_path: Path) -> None:
    done = answers(bart.path, bart.path, "--lines", tmp_path / "lines.txt")
    assert done.returncode == 1
    assert done.stderr.startswith("directories have the same name")
