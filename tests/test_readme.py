"""The README's Python program runs as it is written, with fewer steps and rows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compress

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_api_in_the_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (program,) = [block for block in blocks if "import compress\n" in block]
    program = (
        re.sub(r"steps=\d+", "steps=2", program).replace("[:36000]", "[:400]").replace("[37000:]", "[37000:37100]")
    )
    program = program.replace('"runs/small-onnx"])', '"runs/small-onnx"], new_tokens=4, rounds=1)')
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[0]) > 1
    assert "small-onnx" in done.stdout


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {compress.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {compress.__version__} - " in (ROOT / "CHANGELOG.md").read_text()
