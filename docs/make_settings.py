"""Writes docs/settings.md from the notebook's `Config` and the models of the participants' YAML files.

python docs/make_settings.py
"""

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
FIELD = re.compile(r"^    (\w+): .+?  # (.+)$|^    (\w+): .+$", re.MULTILINE)
HEAD = """# Settings

Made by `python docs/make_settings.py` from the code; a wrong value ends in one line that names it.

## Of the experimenter

`Config` in the notebook; `demo` and `published` are two of them by name. `make run SET="rounds=10 seed=3"`.

"""
YAML = """
## Of a participant

Its YAML file; `make run ENVOY="data.partition=dirichlet data.alpha=1.0"` for all. All must agree on `trigger`,
`backdoor_target`, `backdoor_source` and the classes; whoever measures another backdoor is left out. In an experiment on
known data they agree on everything under `data` but `index`.

| key | default | meaning |
|---|---|---|
"""


def comments(source: str) -> dict[str, str]:
    """field → comment, of a class."""
    return {name or bare: comment or "" for name, comment, bare in FIELD.findall(source)}


def shown(value) -> str:
    return "–" if value is None else f"`{value}`"


def config_table() -> str:
    cells = nbformat.read(ROOT / "FederatedCrowdGuard.ipynb", as_version=4).cells
    first, last = (
        next(i for i, cell in enumerate(cells) if tag in cell.metadata.get("tags", []))
        for tag in ("imports", "settings")
    )
    names = {"__name__": "settings"}
    for cell in cells[first:last]:
        if cell.source.startswith("#| export"):
            exec(cell.source, names)
    meanings = comments(next(cell.source for cell in cells if "class Config" in cell.source))
    rows = [
        f"| `{name}` | {shown(value)} | {shown(getattr(names['published'], name))} | {meanings.get(name, '')} |"
        for name, value in vars(names["demo"]).items()
    ]
    return "\n".join(["| field | demo | published | meaning |", "|---|---|---|---|", *rows, ""])


def yaml_rows() -> str:
    sys.path.insert(0, str(ROOT / "envoy"))
    import private_attributes

    source, rows = Path(private_attributes.__file__).read_text(), []
    for prefix, name in (("", "Settings"), ("data.", "Data"), ("attack.", "Attack")):
        meanings = comments(re.search(rf"class {name}\(Strict\):\n(.*?)\n\n    @|\Z", source, re.DOTALL).group(1))
        for key, field in getattr(private_attributes, name).model_fields.items():
            if field.default_factory is None:
                default = "needed" if field.is_required() else shown(field.default)
                rows.append(f"| `{prefix}{key}` | {default} | {meanings.get(key, '')} |")
    return "\n".join([*rows, ""])


def page() -> str:
    return HEAD + config_table() + YAML + yaml_rows()


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(page())
