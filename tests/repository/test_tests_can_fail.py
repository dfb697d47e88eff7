"""No test passes whatever the code does: each one asserts, or calls a helper that does."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]
ASSERTING = {"raises", "warns", "fail"}  # of pytest


def names_called(function: ast.FunctionDef) -> set[str]:
    """What it calls, by its last name."""
    called = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in called}


def asks(function: ast.FunctionDef) -> bool:
    """Whether it can fail by itself; comparing a constant or a tuple cannot."""
    checks = [node.test for node in ast.walk(function) if isinstance(node, ast.Assert)]
    return any(not isinstance(test, ast.Constant | ast.Tuple) for test in checks)


def toothless(functions: list[ast.FunctionDef]) -> list[str]:
    """The tests among `functions` that no result makes fail."""
    called = {name for f in functions for name in names_called(f)}
    able = ASSERTING | {name for name in called if name.startswith("assert_")}  # numpy's, torch's
    able |= {f.name for f in functions if asks(f)}
    while more := {f.name for f in functions if names_called(f) & able} - able:
        able |= more
    return [f.name for f in functions if f.name.startswith("test_") and f.name not in able]


def test_every_test_can_fail() -> None:
    found = {
        f"{path.relative_to(TESTS).as_posix()}::{name}"
        for path in TESTS.rglob("*.py")
        for name in toothless(
            [
                node
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.FunctionDef)
            ]
        )
    }
    assert sorted(found) == []


def test_a_test_without_an_assertion_is_found() -> None:
    code = (
        "def test_a():\n    run()\ndef test_b():\n    assert (x, 'y')\ndef test_c():\n    check()\n"
    )
    tree = ast.parse(code + "def check():\n    assert x\n")
    assert toothless(tree.body) == ["test_a", "test_b"]  # type: ignore[arg-type]


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their names alone, and the second of them is an error."""
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}
