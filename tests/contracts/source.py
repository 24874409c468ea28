"""The project's own source as the contract tests look at it."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.repository import REPOSITORY

PACKAGE = sorted((REPOSITORY / "pltmoe").rglob("*.py"))
TOOLS = sorted((REPOSITORY / "tools").glob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[str]:
    """Full names of everything imported, wherever in the file: ``from a.b import c`` is a.b.c."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.relative_to(REPOSITORY).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))
