"""Each key of a header is worded in one module; whoever writes a file asks there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import lcp_plugin

PACKAGE = Path(lcp_plugin.__file__).parent
KEY = re.compile(r"(ss_|modelspec\.)\w+")
HASHES = "formats/identity.py"  # made where the tensors are written
HOMES = {"formats/header.py", "formats/lineage.py", HASHES}


def written_keys(tree: ast.AST) -> Iterator[str]:
    """Keys of a header that stand in a dictionary or are assigned to an entry of one."""
    for node in ast.walk(tree):
        keys: list[ast.expr | None] = []
        if isinstance(node, ast.Dict):
            keys = list(node.keys)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys = [node.slice]
        for key in keys:
            text = key.value if isinstance(key, ast.Constant) else None
            if isinstance(text, str) and KEY.fullmatch(text):
                yield text


def test_a_headers_keys_are_written_at_home() -> None:
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "tools").rglob("*.py")]
    found = {
        (file.relative_to(PACKAGE.parent).as_posix(), key)
        for file in files
        if "benchmarks" not in file.parts
        for key in written_keys(ast.parse(file.read_text(encoding="utf-8")))
        if file.relative_to(PACKAGE.parent).as_posix().removeprefix("lcp_plugin/") not in HOMES
    }
    assert found == set()


def test_our_own_keys_are_spelled_by_the_lineage_alone() -> None:
    spelled = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"ss_lcp_\w*", node.value)
    }
    assert spelled <= {"formats/lineage.py"}
