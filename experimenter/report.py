"""The executed notebook as one HTML file that opens without a network: contents, then results, then how they came."""

import html
import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)


def write_report(notebook: Path) -> Path:
    """Writes the report beside the notebook."""
    arranged = arrange(nbformat.read(notebook, as_version=4))
    page, _ = HTMLExporter(mathjax_url="", require_js_url="").from_notebook_node(arranged)
    texts = iter(alternatives(arranged))
    page = re.sub(r'alt="No description[^"]*"', lambda _: f'alt="{next(texts)}"', page)
    path = notebook.with_suffix(".html")
    path.write_text(page)
    return path


def alternatives(notebook) -> list[str]:
    """The texts for those who cannot see the pictures, in their order; nbconvert's template leaves them out."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output.metadata.get("image/png", {}) for output in outputs if "image/png" in output.get("data", {})]
    return [html.escape(picture.get("alt", "")) for picture in pictures]


def arrange(notebook):
    """The notebook's cells with a table of contents, the results first, and formulas as MathML."""
    sections = split(notebook.cells)
    last = max((i for i, cells in enumerate(sections) if title(cells[0]) == "Results"), default=len(sections) - 1)
    title_page, *others = sections
    results, rest = [sections[last]], [cells for cells in others if cells is not sections[last]]
    headings = [title(cells[0]) for cells in (results if last else []) + rest]
    links = [f"- [{heading}](#{heading.replace(' ', '-')})" for heading in headings]
    contents = [nbformat.v4.new_markdown_cell("\n".join(links))]
    notebook.cells = [cell for cells in [title_page, contents, *(results if last else []), *rest] for cell in cells]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = FORMULA.sub(as_mathml, cell.source)
    return notebook


def split(cells: list) -> list[list]:
    """The cells by sections, each of which begins with a heading of the second level."""
    sections = [[]]
    for cell in cells:
        if title(cell) and sections[-1]:
            sections.append([])
        sections[-1].append(cell)
    return sections


def title(cell) -> str:
    found = re.match(r"## (.+)", cell.source) if cell.cell_type == "markdown" else None
    return found.group(1).strip() if found else ""


def as_mathml(found: re.Match) -> str:
    block, inline = found.groups()
    return convert(block or inline, display="block" if block else "inline").replace("\n", " ")
