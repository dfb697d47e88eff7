"""What only one system has is not taken for granted: read from the code itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lcp_plugin.config.names import LONGEST_NAME, is_fit_anywhere, is_fit_as_folder, make_fit

ROOT = Path(__file__).parents[2]
CARD_AND_PROC = "benchmarks"  # tools/benchmarks measures with wait4 and /proc, on Linux
FILES = [
    *sorted((ROOT / "lcp_plugin").rglob("*.py")),
    *(p for p in sorted((ROOT / "tools").rglob("*.py")) if CARD_AND_PROC not in p.parts),
    ROOT / "train_continual_sdxl.py",
]
ONE_SYSTEMS = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "msvcrt", "winreg", "_winapi"}
POSIX_CALLS = {
    "fork", "forkpty", "wait4", "waitpid", "getuid", "geteuid", "setsid", "killpg", "uname",
    "mkfifo", "chown", "symlink", "symlink_to", "link", "hardlink_to", "pipe2", "posix_fadvise",
}  # fmt: skip
POSIX_SIGNALS = {"SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGSTOP", "SIGCHLD"}
TEXT_MODE = re.compile(r"[rwxa+t]+")


def find_in_code(kind: type[ast.AST]) -> Iterator[tuple[str, ast.AST, list[ast.AST]]]:
    """(place, node, what it stands in) of every node of a kind."""

    def walk(node: ast.AST, above: list[ast.AST]) -> Iterator[tuple[ast.AST, list[ast.AST]]]:
        if isinstance(node, kind):
            yield node, above
        for child in ast.iter_child_nodes(node):
            yield from walk(child, [*above, node])

    for path in FILES:
        for node, above in walk(ast.parse(path.read_text(encoding="utf-8")), []):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node, above


def is_guarded(above: list[ast.AST]) -> bool:
    """Whether a failing import is caught there, or happens in a function only when called."""
    inside = any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in above)
    return inside or any(isinstance(node, ast.Try) and node.handlers for node in above)


def test_no_module_needs_at_its_import_what_one_system_alone_has() -> None:
    found = []
    for place, node, above in find_in_code(ast.Import):
        assert isinstance(node, ast.Import)
        names = {alias.name.split(".")[0] for alias in node.names}
        found += [place] if names & ONE_SYSTEMS and not is_guarded(above) else []
    for place, node, above in find_in_code(ast.ImportFrom):
        assert isinstance(node, ast.ImportFrom)
        module = (node.module or "").split(".")[0]
        found += [place] if module in ONE_SYSTEMS and not is_guarded(above) else []
    assert not found


def test_nothing_forks_or_sends_signals_that_windows_has_not() -> None:
    found = []
    for place, node, _ in find_in_code(ast.Attribute):
        assert isinstance(node, ast.Attribute)
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        if (owner == "os" and node.attr in POSIX_CALLS) or node.attr in POSIX_SIGNALS:
            found.append(f"{place} {node.attr}")
    assert not found


def test_no_start_method_is_assumed_but_spawn() -> None:
    """forkserver stands in `library_server` alone, which answers None where it is not safe."""
    found = []
    for place, node, _ in find_in_code(ast.Constant):
        assert isinstance(node, ast.Constant)
        if node.value in ("fork", "forkserver") and "evaluation/processes.py" not in place:
            found.append(place)
    assert not found


def test_text_names_its_encoding() -> None:
    found = []
    for place, node, _ in find_in_code(ast.Call):
        assert isinstance(node, ast.Call)
        if opens_text(node) and not names_encoding(node):
            found.append(place)
    assert not found


def name_of(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def opens_text(call: ast.Call) -> bool:
    """read_text, write_text, open in a text mode, a process whose output is read as text."""
    name, keywords = name_of(call), {k.arg: k.value for k in call.keywords}
    if name in ("read_text", "write_text"):
        return True
    if name in ("run", "Popen", "check_output"):
        return "text" in keywords or "universal_newlines" in keywords
    if name != "open":
        return False
    by_name = isinstance(call.func, ast.Name)
    place = 1 if by_name else 0
    mode = keywords.get("mode") or (call.args[place] if len(call.args) > place else None)
    if mode is None:
        return by_name
    return isinstance(mode, ast.Constant) and bool(TEXT_MODE.fullmatch(str(mode.value)))


def names_encoding(call: ast.Call) -> bool:
    """By keyword, or where read_text and write_text take it by place."""
    places = {"read_text": 0, "write_text": 1}
    at = places.get(name_of(call), len(call.args))
    return len(call.args) > at or any(k.arg == "encoding" for k in call.keywords)


@pytest.mark.parametrize(
    "name", ["con", "NUL.txt", "com1", "a.", "a ", " a", "a:b", "a/b", "a\\b", "a?", "a\nb"]
)
def test_names_that_a_system_refuses_are_found(name: str) -> None:
    assert not is_fit_anywhere(name)
    assert not is_fit_as_folder(name)


def test_a_name_is_made_fit_without_losing_more_than_it_must() -> None:
    assert make_fit('a "cat": 1/2', "x") == "a _cat__ 1_2"
    assert make_fit("Zoë.", "x") == "Zoë"
    assert make_fit(" . ", "x") == "x"
    assert len(make_fit("long " * 99, "x")) <= LONGEST_NAME
    assert is_fit_anywhere("Zoë")
    assert is_fit_as_folder("console")
