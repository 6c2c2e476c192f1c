"""The files that a result copies from the model directory of its source: configs and tokenizer, without paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

SETTINGS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "spiece.model", "chat_template.jinja"),
)
"""The files to copy. All others are left behind."""
_PATHS = ("_name_or_path", "name_or_path", "tokenizer_file")


def copy_settings(source: Path, out: Path) -> None:
    """Copy the configs and tokenizer files of a model directory, without the paths that some tools leave in them."""
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name not in SETTINGS:
            continue
        shutil.copyfile(file, out / file.name)
        if file.name.endswith("config.json"):
            forget_paths(out / file.name)


def forget_paths(file: Path) -> None:
    """Remove the paths that some tools leave in a JSON file of settings."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in settings.items() if name not in _PATHS}
    if kept != settings:
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
