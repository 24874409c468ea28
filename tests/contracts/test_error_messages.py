"""Every message for a user is met by a test: the text it raises occurs among the tests."""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.contracts.source import PACKAGE, REPOSITORY, TOOLS, name_of, tree

ERRORS = {"ConfigError", "DataError", "CheckpointError", "EngineError", "ConversionError"}


def literals(node: ast.expr) -> list[str]:
    """The constant pieces of a message, f-strings taken apart."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return [piece for value in node.values for piece in literals(value)]
    if isinstance(node, ast.BinOp):
        return literals(node.left) + literals(node.right)
    if isinstance(node, ast.IfExp):
        return literals(node.body)
    return []


def words(text: str) -> str:
    """Letters and digits only: tests quote, escape and break messages in their own ways."""
    return " ".join(re.findall(r"[A-Za-z0-9]+", text))


def raise_sites() -> Iterator[tuple[str, list[str]]]:
    for path in [*PACKAGE, *TOOLS]:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            call = node.exc
            if isinstance(call.func, ast.Name) and call.func.id in ERRORS and call.args:
                pieces = [words(piece) for piece in literals(call.args[0])]
                if any(len(piece.split()) >= 2 for piece in pieces):  # else: made elsewhere
                    yield f"{name_of(path)}:{node.lineno}", pieces


@cache
def strings_of_tests() -> str:
    """All strings of all tests, as words."""
    texts = []
    for path in sorted((REPOSITORY / "tests").rglob("*.py")):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(f" {words(node.value)} ")
    return "|".join(texts)


SITES = list(raise_sites())


@pytest.mark.parametrize(("where", "pieces"), SITES, ids=[site[0] for site in SITES])
def test_message_is_met_by_a_test(where: str, pieces: list[str]):
    """Two or three words in a row of the message have to occur in a string of some test."""
    for piece in pieces:
        parts = piece.split()
        size = min(3, len(parts))
        for start in range(len(parts) - size + 1):
            chunk = " ".join(parts[start : start + size])
            if size >= 2 and f" {chunk} " in strings_of_tests():
                return
    raise AssertionError(f"{where}: no test quotes {[p for p in pieces if p]}")
