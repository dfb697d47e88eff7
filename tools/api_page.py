"""Write docs/api.md, what a plugin imports, from the docstrings. `--check` only compares.

python tools/api_page.py
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pages import write_page

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
MODULES = ("hooks", "adapter", "delta", "tasks", "lora", "errors", "seeds", "registry", "kohya")
HEAD = """# API

What a strategy or an observer imports, and what sd-scripts calls. These modules and their names
stay where they are; everything else in `lcp_plugin` may move. How to use them:
[write_a_strategy.md](write_a_strategy.md); what they stand for: [design.md](design.md).

This page is written by `python tools/api_page.py`.

{contents}
"""
Documented = ast.FunctionDef | ast.ClassDef


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return write_page(argv, __doc__, PAGE, render_page)


def render_page() -> str:
    """The page as Markdown: each module, its values, classes and functions in their order."""
    contents = "\n".join(
        f"* [`lcp_plugin.{name}`](#lcp_plugin{name}): {_first_sentence(_tree(name))}"
        for name in MODULES
    )
    chapters = [block for name in MODULES for block in _module(name)]
    return "\n\n".join([HEAD.format(contents=contents).rstrip(), *chapters]) + "\n"


def _tree(module: str) -> ast.Module:
    path = ROOT / "lcp_plugin" / f"{module}.py"
    return ast.parse(path.read_text(encoding="utf-8"))


def _module(name: str) -> Iterator[str]:
    source = (ROOT / "lcp_plugin" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    tree = _tree(name)
    yield f"## `lcp_plugin.{name}`"
    yield _prose(ast.get_docstring(tree) or "")
    for node in tree.body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield from _class(node, source) if isinstance(node, ast.ClassDef) else _function(node)


def _class(node: ast.ClassDef, source: Sequence[str]) -> Iterator[str]:
    """Heading, docstring, fields as they stand with their comments, and a list of the methods."""
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    yield f"### class `{node.name}{f'({bases})' if bases else ''}`"
    yield _prose(ast.get_docstring(node) or "")
    fields = [
        line[4:]
        for field in node.body
        if isinstance(field, ast.AnnAssign | ast.Assign)
        for line in source[field.lineno - 1 : field.end_lineno]
    ]
    if fields:
        yield "\n".join(["```python", *fields, "```"])
    methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and _is_public(m)]
    if methods:
        yield "\n".join(_item(method) for method in methods)


def _is_public(method: ast.FunctionDef) -> bool:
    """Whether a plugin may call it; of the dunders an `__init__` with arguments of its own."""
    takes = method.args.args[1:] or method.args.kwonlyargs
    return not method.name.startswith("_") or (method.name == "__init__" and bool(takes))


def _item(method: ast.FunctionDef) -> str:
    text = re.sub(r" \* (?=`)", " ", " ".join(_prose(ast.get_docstring(method) or "").split()))
    is_property = any(ast.unparse(d) == "property" for d in method.decorator_list)
    returns = ast.unparse(method.returns) if method.returns else ""
    shown = f"{method.name}: {returns}" if is_property else _signature(method)
    return f"* `{shown}`{f': {text}' if text else ''}"


def _function(node: ast.FunctionDef) -> Iterator[str]:
    yield f"### `{_signature(node)}`"
    yield _prose(ast.get_docstring(node) or "")


def _signature(node: ast.FunctionDef) -> str:
    """`name(a: int, b: str = "x") -> Tensor` on one line, without self and cls."""
    arguments = ast.unparse(node.args)
    arguments = re.sub(r"^(self|cls)(, |$)", "", arguments)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({arguments}){'' if returns == ' -> None' else returns}"


def _first_sentence(tree: ast.Module) -> str:
    text = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return _escape(re.split(r"(?<=\.) |: (?=\w+ \w+ \w+ =)", text)[0])


def _prose(docstring: str) -> str:
    """A docstring as Markdown: `Args:` and `Raises:` become lists, formulas keep their lines."""
    paragraphs = [_paragraph(block) for block in docstring.split("\n\n")]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _paragraph(block: str) -> str:
    lines = block.splitlines()
    if all(line.startswith("    ") for line in lines):
        return block  # code
    found: list[str] = []
    section = ""
    for line in lines:
        if re.fullmatch(r"(Args|Raises|Returns):", line):
            found += ["", line, ""]
            section = line
        elif section in ("Args:", "Raises:") and re.match(r"    \S", line):
            found.append(_argument(line.strip()))
        elif section:
            found[-1] += f" {_escape(line.strip())}" if found[-1] else _escape(line.strip())
        elif line.startswith("    "):
            found += ["", "```text", line[4:], "```", ""]
        else:
            found.append(_escape(line))
    text = re.sub(r"\n```\n\n\n```text\n", "\n", "\n".join(found).strip())
    return re.sub(r"\n{3,}", "\n\n", text)


def _argument(line: str) -> str:
    name, colon, text = line.partition(":")
    return f"* `{name}`{colon}{_escape(text)}"


def _escape(text: str) -> str:
    """What GitHub would take for a tag or emphasis, outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([<*])(?=\S)", r"\\\1", part) for part in parts
    )


if __name__ == "__main__":
    sys.exit(main())
