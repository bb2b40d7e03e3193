"""The executed notebook as one HTML file that opens without a network: results first, then how they came."""

import html
import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

from experimenter.run import NOTEBOOK, without_noise

LINK = re.compile(r"\]\((?!https?:|#)")
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)
# On paper nothing scrolls: lines of code are smaller there, and broken where they are still too long.
ON_PAPER = """<style>@media print {
pre { font-size: 65% !important; white-space: pre-wrap !important }
h2, h3 { break-after: avoid }
.jp-OutputArea-child { break-inside: avoid }
}</style>"""


def write_report(notebook: Path) -> Path:
    """Writes the report beside the notebook."""
    root = NOTEBOOK.resolve().parent.as_uri()  # of the notebook's links, wherever the report is moved to
    arranged = arrange(nbformat.read(notebook, as_version=4), root)
    exporter = HTMLExporter(mathjax_url="", require_js_url="", exclude_input_prompt=True, exclude_output_prompt=True)
    page, _ = exporter.from_notebook_node(arranged)
    page = page.replace("</head>", f"{ON_PAPER}</head>", 1)
    texts = iter(alternatives(arranged))
    page = re.sub(r'alt="No description[^"]*"', lambda _: f'alt="{next(texts)}"', page)
    path = notebook.with_suffix(".html")
    path.write_text(page, encoding="utf-8")
    return path


def alternatives(notebook) -> list[str]:
    """The texts for those who cannot see the pictures, in their order; nbconvert's template leaves them out."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output.metadata.get("image/png", {}) for output in outputs if "image/png" in output.get("data", {})]
    return [html.escape(picture.get("alt", "")) for picture in pictures]


def arrange(notebook, root="."):
    """The notebook's cells with the results after the introduction, ready to be read; links start from `root`."""
    front, *sections = split(notebook.cells)
    opening = next((i for i, cell in enumerate(front) if cell.cell_type == "code"), len(front))
    sections.sort(key=lambda cells: title(cells[0]) != "Results")  # stable: the others stay in their order
    results = [cells for cells in sections[:1] if title(cells[0]) == "Results"]
    parts = [front[:opening], *results, front[opening:], *sections[len(results) :]]
    notebook.cells = [cell for part in parts for cell in part]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(f"]({root}/", FORMULA.sub(as_mathml, cell.source))
        elif cell.cell_type == "code":
            cell.outputs = without_noisy(cell.outputs)
    return notebook


def without_noisy(outputs: list) -> list:
    """The outputs without noise, and without those that were nothing else."""
    for output in outputs:
        if output.output_type == "stream":
            output.text = without_noise(output.text)
    return [output for output in outputs if output.get("text") != ""]


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
    formula = convert(block or inline, display="block" if block else "inline").replace("\n", " ")
    return formula.replace("<mover>", '<mover accent="true">')  # or a tilde floats above its letter
