"""The README's commands, word for word, on a quickstart of a few steps (``.ci/run`` runs it in full)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = (
    "stages.masks.train.steps=2",
    "stages.pruned.train.steps=2",
    "stages.small.train.steps=2",
    "data.test.limit=200",
)
SPEED = ("measure[2].new_tokens=4", "measure[2].rounds=2")


def _shell(command: str, cwd: Path) -> str:
    """Run a command line as a shell would, with ``compress-lm`` meaning this checkout."""
    program = f"{sys.executable} -m compress"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    line = re.sub(r"^compress-lm\b", program, command)
    done = subprocess.run(["bash", "-c", line], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _readme_commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("compress-lm ")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like a checkout after a (short) ``make quickstart``."""
    home = tmp_path_factory.mktemp("checkout")
    (home / "recipes").symlink_to(ROOT / "recipes")
    settings = " ".join(f"--set '{setting}'" for setting in (*SHORT, *SPEED))
    _shell(f"compress-lm run recipes/quickstart/quickstart.yaml --workdir runs/quickstart {settings}", home)
    return home


@pytest.mark.slow
def test_the_report_is_there_and_tells_sizes_quality_and_speed(home):
    workdir = home / "runs/quickstart"
    assert "<svg" in (workdir / "report.html").read_text()
    report = json.loads((workdir / "report.json").read_text())
    records = {record["name"]: record for record in report["artifacts"]}
    small = records["small-onnx"]
    assert small["bytes"] < records["base-onnx"]["bytes"] / 8
    assert small["quality"]["perplexity"] > 1
    assert small["speed"]["per_token_ms"]["p50"] > 0
    assert str(ROOT) not in (workdir / "report.json").read_text()


@pytest.mark.slow
def test_every_command_of_the_readme_works(home):
    commands = _readme_commands()
    assert len(commands) >= 5
    for command in commands:
        assert _shell(command, home).strip()


@pytest.mark.slow
def test_the_readmes_deployment_runs_without_torch(home):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (program,) = [block for block in blocks if "Runtime" in block]
    guard = "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", guard + program], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ROMEO:")
