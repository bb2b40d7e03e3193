"""YAML that means what it says: every key once, and only plain numbers are numbers.

PyYAML reads YAML 1.1, in which `010` is 8, `1:30` is 90 and `no` is false. Here these are texts, which a setting that
wants a number or a boolean refuses, as in the core schema of YAML 1.2.
"""

import re
from pathlib import Path

import yaml


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # none of YAML 1.1

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if doubled := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{doubled[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


for tag, pattern, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"-?(0|[1-9][0-9]*)", list("-0123456789")),
    ("float", r"-?(0|[1-9][0-9]*|(?=\.[0-9]))(\.[0-9]*)?([eE][-+]?[0-9]+)?", list("-.0123456789")),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), first)


def parse(text: str):
    """What a text of YAML says.

    Raises: `ValueError` with one line.
    """
    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a number, or a nesting, may be too long for Python
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None


def read(path: str | Path):
    """What a file of YAML says.

    Raises: `ValueError` with one line that does not name the file.
    """
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8: save the file with that encoding") from None
