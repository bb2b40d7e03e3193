"""The pages say what the code does, and their links lead somewhere."""

import re

import pytest
from conftest import ROOT, load_module

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_settings_are_those_of_the_code():
    made = load_module("make_settings", ROOT / "docs" / "make_settings.py").page()
    assert (ROOT / "docs" / "settings.md").read_text() == made, "python docs/make_settings.py"
    assert "|  |" not in made.replace("| `data.test_samples` | – |  |", ""), "each has a meaning"


def anchors(text):
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            there = (page.parent / path) if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there.read_text()), target


def test_the_readme_fits():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
