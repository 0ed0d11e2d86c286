"""The specification depends on the standard library alone."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vapama import spec

FOLDER = Path(spec.__file__).parent
SOURCES = sorted(FOLDER.rglob("*.py"))


def imported(source: str) -> Iterator[str]:
    """The modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            if node.module == "vapama":
                yield from (f"vapama.{alias.name}" for alias in node.names)


def foreign(source: str) -> list[str]:
    ours = "vapama", "vapama.spec"
    return [
        name
        for name in imported(source)
        if name not in ours
        and not name.startswith("vapama.spec.")
        and name.partition(".")[0] not in sys.stdlib_module_names
    ]


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(FOLDER)) for p in SOURCES])
def test_a_module_of_the_specification_imports_nothing_foreign(path: Path) -> None:
    assert foreign(path.read_text()) == []


def test_a_foreign_import_would_be_noticed() -> None:
    assert len(SOURCES) >= 12
    source = "import os, numpy\ndef f():\n    from vapama import impl\n    from .x import y\n"
    assert foreign(source) == ["numpy", "vapama.impl", ".x"]
