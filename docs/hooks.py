"""Hooks of the documentation site: files outside ``docs/`` join it, and roles in docstrings become links."""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
"""Pages of the site that stand elsewhere in the repository; README.md is its home."""
OTHERS = (
    "LICENSE",
    "CITATION.cff",
    "recipes/**/*.yaml",
    "recipes/**/*.md",
    "compress/models/families/*.py",
    "compress/measure/metrics/*.py",
    "tests/plugin/**/*",
)
"""Files that pages link to; the site serves them as they are."""
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)")
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>~?([\w.]+)</code>")


def on_files(files: Files, config: Any) -> Files:
    """Add the files that pages link to."""
    for name in ("README.md", *PAGES):
        text = (ROOT / name).read_text(encoding="utf-8")
        target = "index.md" if name == "README.md" else name
        files.append(File.generated(config, target, content=_relinked(text, name, target)))
    for pattern in OTHERS:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                name = path.relative_to(ROOT).as_posix()
                served = f"{name}.txt" if name.endswith(".md") else name
                files.append(File.generated(config, served, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page that lead out of ``docs/`` lead to the files added above."""
    source = page.file.src_uri
    if source == "index.md" or source in PAGES:  # already relinked
        return markdown
    return _relinked(markdown, f"docs/{source}", source)


def on_page_content(html: str, **_: Any) -> str:
    """``:func:`name``` in a docstring links to the page of that name."""
    return ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)


def _relinked(text: str, source: str, target: str) -> str:
    """Links relative to ``source`` in the repository, as links relative to ``target`` in the site."""

    def moved(match: re.Match[str]) -> str:
        place = normpath(join(dirname(source), match[2]))
        site = place.removeprefix("docs/")
        if place == "docs/methods":
            site = "papers.md"
        elif place == "README.md":
            site = "index.md"
        elif place.endswith(".md") and place == site and place not in PAGES:
            site = f"{place}.txt"
        return match[1] + relpath(site, dirname(target) or ".")

    return LINK.sub(moved, text)
