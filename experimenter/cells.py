"""The notebook's cells: which of them participants receive."""

import ast
import contextlib
import re


def exported(cell) -> bool:
    return cell.cell_type == "code" and re.match(r"#\s*\|\s*(default_exp|export)", cell.source) is not None


def defined(cell) -> dict[str, bool]:
    """The names that a cell of code defines, name → whether it is a function or class."""
    names = {}
    with contextlib.suppress(SyntaxError):  # a cell with magic commands
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names[node.name] = True
            for target in getattr(node, "targets", []):
                names |= {name.id: False for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def check_exports(notebook) -> None:
    """`ValueError` if a cell without `#| export` replaces a function or class: it would not reach the participants."""
    known = {}
    for number, cell in enumerate(notebook.cells, 1):
        if exported(cell):
            known |= {name: number for name, callable in defined(cell).items() if callable}
        elif cell.cell_type == "code":
            for name in defined(cell).keys() & known.keys():
                words = f"participants would take that of cell {known[name]}: export this cell, or use another name"
                raise ValueError(f"cell {number} defines {name} again without `#| export`; {words}")
