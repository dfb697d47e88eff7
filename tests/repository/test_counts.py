"""The house in numbers, counted from the code: files, functions, parameters, how prose wraps."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lcp_plugin"
WIDTH = 100
SPARE = 10  # columns that a line may leave open beside the word that would still have fitted

MANY_PARAMETERS = {  # function -> why it takes more than six
    "config/fields.py option": "the columns of the table of options, given by name",
    "kohya.py create_network": "sd-scripts calls it",
    "kohya.py create_network_from_weights": "sd-scripts calls it",
    "sdxl/adapted_linear.py forward": "torch.autograd calls it",
    "strategies/recall.py __init__": "each is a key of --strategy_args",
}

Line = tuple[int, str]  # number, text without what marks it as a docstring or comment
PREFORMATTED = re.compile(r"python |\||\.\.\.|>>>|[\w., ]+ = |.*\S {2,}\S")  # code and tables
ITEM = re.compile(r"[-*+>] |\d+\. |\w*:(\s|$)")


def files(*roots: str) -> list[Path]:
    """Every Python file below these folders."""
    return [path for root in roots for path in sorted((ROOT / root).rglob("*.py"))]


@cache
def read(path: Path) -> tuple[str, ast.Module]:
    """A file's text and its tree."""
    text = path.read_text(encoding="utf-8")
    return text, ast.parse(text)


def place(path: Path, row: int) -> str:
    return f"{path.relative_to(ROOT)}:{row}"


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    """Every function of a file, methods and inner ones included."""
    return (node for node in ast.walk(read(path)[1]) if isinstance(node, ast.FunctionDef))


def parameters(function: ast.FunctionDef) -> list[str]:
    """What a call may give, without self and cls."""
    found = function.args
    named = [*found.posonlyargs, *found.args, *found.kwonlyargs]
    rest = [arg for arg in (found.vararg, found.kwarg) if arg]
    return [arg.arg for arg in [*named, *rest] if arg.arg not in ("self", "cls")]


# ------------------------------------------------------------------------------------- the counts


def test_at_most_sixteen_files_lie_beside_the_rooms() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 16


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {
        path: len(read(path)[0].splitlines()) for path in files("lcp_plugin", "tools", "tests")
    }
    assert not [f"{place(p, n)}" for p, n in lengths.items() if n > 400]


def test_the_runner_is_told_in_200_lines() -> None:
    assert len(read(PACKAGE / "run" / "runner.py")[0].splitlines()) <= 200


def test_no_function_is_longer_than_60_lines() -> None:
    long = [
        f"{place(path, f.lineno)} {f.name}"
        for path in files("lcp_plugin", "tools", "tests")
        for f in functions(path)
        if f.end_lineno is not None and f.end_lineno - f.lineno >= 60
    ]
    assert not long, "\n".join(long)


def test_no_function_takes_more_than_six_parameters() -> None:
    many = {
        f"{path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT)} {f.name}"
        for path in files("lcp_plugin", "tools")
        for f in functions(path)
        if len(parameters(f)) > 6
    }
    assert not many - set(MANY_PARAMETERS), "\n".join(sorted(many - set(MANY_PARAMETERS)))
    assert not set(MANY_PARAMETERS) - many, "these take six by now: name them no longer"


# ----------------------------------------------------------------------------------------- prose


def docstrings(path: Path) -> Iterator[list[Line]]:
    """The lines of every docstring, indented as they stand."""
    text, tree = read(path)
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            string = node.body[0]
            assert string.end_lineno is not None
            rows = range(string.lineno, string.end_lineno + 1)
            yield [(row, lines[row - 1].replace('"""', "").rstrip()) for row in rows]


def comments(path: Path) -> Iterator[list[Line]]:
    """The lines of every comment; one that stands behind code begins a new one."""
    block: list[Line] = []
    beside = -1  # the column of the comment so far
    for token in tokenize.generate_tokens(io.StringIO(read(path)[0]).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, column = token.start
        alone = not token.line[:column].strip()
        if block and not (alone and block[-1][0] == row - 1 and column == beside):
            yield block
            block = []
        block.append((row, " " * (column + 1) + token.string[1:].rstrip()))
        beside = column
    if block:
        yield block


def paragraphs(block: Sequence[Line]) -> Iterator[list[Line]]:
    """What empty lines and beginnings of list items divide a docstring or comment into."""
    found: list[Line] = []
    for row, text in block:
        if found and (not text.strip() or ITEM.match(text.strip())):
            yield found
            found = []
        if text.strip():
            found.append((row, text))
    if found:
        yield found


def indent(text: str) -> int:
    return len(text) - len(text.lstrip())


def complaints(block: Sequence[Line]) -> Iterator[tuple[int, str]]:
    """Line numbers at which prose wraps a single word, or breaks though more would have fitted."""
    base = indent(block[0][1])
    for paragraph in paragraphs(block):
        for (row, text), (below, rest) in pairwise(paragraph):
            if any(PREFORMATTED.match(line.strip()) for line in (text, rest)):
                continue
            words = rest.split()
            last = below == paragraph[-1][0]
            if last and len(words) == 1 and not text.endswith(":") and indent(rest) >= base:
                yield below, f"'{words[0]}' alone"
            elif text[-1] not in ".:;?!," and indent(text) == indent(rest) < base + 4:
                if WIDTH - len(text) - 1 - len(words[0]) >= SPARE:
                    yield row, f"breaks before '{words[0]}'"


def test_no_docstring_or_comment_wraps_one_word_or_breaks_in_mid_phrase() -> None:
    found = [
        f"{place(path, row)} {what}"
        for path in files("lcp_plugin", "tools", "tests")
        for block in [*docstrings(path), *comments(path)]
        for row, what in complaints(block)
    ]
    assert not found, "\n".join(found)


SENTENCE = (
    "A sentence that goes on and on until it meets the edge of the page, which lies right here at"
)


@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        ([SENTENCE, "last."], [2]),
        ([SENTENCE, "the last column of a line."], []),
        (["It breaks far", "too early for its width."], [1]),
        (["It ends a sentence.", "Another one begins."], []),
        (["* an item", "* another"], []),
        (["Args:", "    name: what it is called", "    other: what else there is"], []),
        (["a   the first letter", "b   the second"], []),
        (["D = B A", "U"], []),
    ],
)
def test_the_reader_of_prose_finds_what_is_wrong_and_no_more(
    lines: list[str], rows: list[int]
) -> None:
    assert [row for row, _ in complaints(list(enumerate(lines, 1)))] == rows


def strings_in_a_row(path: Path) -> Iterator[list[Line]]:
    """Literals that stand next to each other, which Python joins: (row, source) of each."""
    text = read(path)[0]
    lines = text.splitlines(keepends=True)
    begins = getattr(tokenize, "FSTRING_START", None)  # from Python 3.12 on
    ends = getattr(tokenize, "FSTRING_END", None)
    found: list[Line] = []
    opened: list[tuple[int, int]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == begins:
            opened.append(token.start)
        elif token.type == ends:
            (row, column), (last, end) = opened.pop(), token.end
            if not opened:
                inside = lines[row - 1 : last]
                inside[-1] = inside[-1][:end]
                found.append((row, "".join(inside)[column:]))
        elif opened or token.type in (tokenize.NL, tokenize.COMMENT):
            continue
        elif token.type == tokenize.STRING:
            found.append((token.start[0], token.string))
        else:
            if len(found) > 1:
                yield found
            found = []


def is_one_word(source: str) -> bool:
    """Whether a literal holds a single word and no value; a line of its own may."""
    body = re.sub(r"^[a-zA-Z]*(\"\"\"|\"|')|(\"\"\"|\"|')$", "", source)
    return "{" not in body and len(body.split()) == 1 and not body.endswith("\\n")


def test_no_f_string_is_continued_by_a_single_word() -> None:
    found = [
        f"{place(path, row)} {source}"
        for path in files("lcp_plugin", "tools", "tests")
        for strings in strings_in_a_row(path)
        if any(re.match(r"[rR]?[fF]", source) for _, source in strings)
        for row, source in strings
        if is_one_word(source)
    ]
    assert not found, "\n".join(found)
