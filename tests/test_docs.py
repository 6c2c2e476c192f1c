"""The documentation speaks of what exists: links, names in code, make targets, stages and terms."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

import compress
from compress.models import GROUP
from compress.registry import MEASUREMENTS, METRICS, QUANTIZERS, STAGES, TERMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
CARDS = sorted(ROOT.glob("docs/methods/*.md"))
PLUGIN = "\n".join(text.read_text(encoding="utf-8") for text in sorted((ROOT / "tests/plugin").rglob("*.py")))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text(page):
    return page.read_text(encoding="utf-8")


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text(page)):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@each_page
def test_the_site_serves_the_files_that_pages_link_to(page):
    hooks = ast.parse(text(ROOT / "docs/hooks.py"))
    lists = {each.targets[0].id: each.value for each in hooks.body if isinstance(each, ast.Assign)}
    served = {path for pattern in ast.literal_eval(lists["OTHERS"]) for path in ROOT.glob(pattern)}
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text(page)):
        path = (page.parent / target).resolve()
        if path.suffix != ".md" and path.is_file() and not path.is_relative_to(ROOT / "docs"):
            assert path in served, f"{page.name} links to {target}, which docs/hooks.py does not serve"


@each_page
def test_names_in_code_exist(page):
    groups = {registry.group for registry in (STAGES, TERMS, MEASUREMENTS, METRICS, QUANTIZERS)} | {GROUP}
    for name in set(re.findall(r"`(compress(?:\.\w+)+)(?:\([^`]*\))?`", text(page))) - groups:
        parts = name.split(".")
        for at in range(len(parts), 0, -1):
            try:
                found = import_module(".".join(parts[:at]))
            except ModuleNotFoundError:
                continue
            for attribute in parts[at:]:
                found = getattr(found, attribute)
            break


@each_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w.-]+):", text(ROOT / "Makefile"), flags=re.MULTILINE))
    for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text(page), flags=re.MULTILINE):
        assert target in targets, f"{page.name} speaks of make {target}"


@each_page
def test_types_in_recipes_are_known(page):
    known = {*STAGES.names(), *TERMS.names(), *MEASUREMENTS.names()}
    known |= set(re.findall(r'type: Literal\["(\w+)"\]', PLUGIN))
    assert set(re.findall(r"\btype: (?!Literal)(\w+)", text(page))) <= known


@pytest.mark.parametrize("name", [*STAGES.names(), *TERMS.names()])
def test_every_stage_and_term_is_documented(name):
    if name in {"finetune", "distill"}:  # they are their terms
        return
    assert any(re.search(rf"[`:] ?{name}\b", text(card)) for card in CARDS), f"no card in docs/methods speaks of {name}"


@pytest.mark.parametrize("name", [name for name in METRICS.names() if METRICS.get(name).reads == "text"])
def test_every_metric_of_texts_is_documented(name):
    assert f"`{name}`" in text(ROOT / "docs/methods/text_metrics.md")


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_every_card_is_linked(card):
    others = [page for page in PAGES if page != card]
    assert any(card.name in text(page) for page in others), f"nothing links to {card.name}"


@pytest.mark.parametrize("name", [name for name in compress.__all__ if name != "__version__"])
def test_every_public_name_has_an_entry_in_the_api_page(name):
    assert f"::: compress.{name}\n" in text(ROOT / "docs/api.md") + "\n"


def test_every_page_is_in_the_navigation():
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    navigation = text(ROOT / "mkdocs.yml")
    assert [page for page in pages if f": {page}\n" not in navigation] == []


def test_the_examples_of_the_extending_page_are_the_plug_in():
    def plain(source):
        return re.sub(r"\s+", " ", source)

    blocks = re.findall(r"```toml\n(.*?)```", text(ROOT / "docs/extending.md"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        assert plain(block).strip() in plain(text(ROOT / "tests/plugin/pyproject.toml"))
    for name in re.findall(r"^(?:class|def) (\w+)", text(ROOT / "docs/extending.md"), flags=re.MULTILINE):
        assert re.search(rf"^(?:class|def) {name}\b", PLUGIN, flags=re.MULTILINE), name
