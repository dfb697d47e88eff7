"""Every hook is documented where its readers look, and every strategy names its source."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from lcp_plugin import hooks
from lcp_plugin.hooks import Observer, Strategy
from lcp_plugin.observers import BUILT_IN as OBSERVERS
from lcp_plugin.strategies import BUILT_IN as STRATEGIES

ROOT = Path(__file__).parents[2]
WRITE = ROOT / "docs" / "write_a_strategy.md"
HOOKS = [
    (kind, name)
    for kind in (Strategy, Observer)
    for name, _ in inspect.getmembers(kind, inspect.isfunction)
    if not name.startswith("_")
]


@pytest.mark.parametrize(("kind", "hook"), HOOKS, ids=lambda v: getattr(v, "__name__", v))
def test_every_hook_says_what_it_is_for(kind: type, hook: str) -> None:
    doc = getattr(kind, hook).__doc__
    assert doc
    assert len(doc.split()) >= 3


@pytest.mark.parametrize("hook", sorted({name for _, name in HOOKS}))
def test_every_hook_is_named_on_the_page_on_writing_ones_own(hook: str) -> None:
    tables = [line for line in WRITE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert any(re.search(rf"\b{hook}\b", line.split("|")[1]) for line in tables), hook


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_built_in_strategy_names_its_source(name: str) -> None:
    module = inspect.getmodule(STRATEGIES[name])
    assert module is not None
    assert re.search(r"arXiv \d{4}\.\d{5}", " ".join((module.__doc__ or "").split()))


@pytest.mark.parametrize("name", [*STRATEGIES, *OBSERVERS])
def test_every_built_in_has_one_line_for_the_catalogue(name: str) -> None:
    cls = {**STRATEGIES, **OBSERVERS}[name]
    assert cls.name == name
    assert cls.__doc__
    first = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    assert first.endswith(".")
    assert len(first) < 120


@pytest.mark.parametrize("name", ["naive", "merge_init", "merge_ortho_init", "magmax"])
def test_the_papers_strategies_say_where_they_differ_from_the_authors_code(name: str) -> None:
    module = inspect.getmodule(STRATEGIES[name])
    assert module is not None
    text = " ".join((module.__doc__ or "").split())
    assert "Where we differ from the authors' code" in text
    assert "2410.04891" in text


def test_everything_public_in_hooks_is_documented() -> None:
    tree = ast.parse(inspect.getsource(hooks))
    bare = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_built_in_strategy_has_an_entry_point_in_setup(name: str) -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    cls = STRATEGIES[name]
    path = f"{cls.__module__.removeprefix('lcp_plugin.strategies.')}:{cls.__name__}"
    assert f'"{name}": "{path}"' in text


def test_packages_that_need_one_say_so_in_an_entry_point_group() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    for group in ("lcp_plugin.strategies", "lcp_plugin.observers"):
        assert f'"{group}"' in text


def test_every_path_that_contributing_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    spans = [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()]
    named = {word for word in spans if "/" in word or word.endswith((".py", ".md", ".txt"))}
    named |= set(re.findall(r"[\w./]+\.(?:py|toml)\b", text))
    missing = [name for name in sorted(named) if not list(ROOT.glob(name))]
    missing = [name for name in missing if not list((ROOT / "lcp_plugin").glob(name))]
    assert len(named) > 30
    assert not missing


def test_contributing_names_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| ([a-z_, ]+) \|", text.split("## Ten changes")[0], re.MULTILINE)
    named = {room for cell in cells for room in cell.split(", ")}
    package = ROOT / "lcp_plugin"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    rooms |= {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert rooms <= named, rooms - named


def test_contributing_fits_on_two_screens() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_tests_that_scripts_name_are_there() -> None:
    for script in (ROOT / ".ci").iterdir():
        named = re.findall(r"tests/[\w/*]+\.py", script.read_text(encoding="utf-8"))
        assert not [name for name in named if not list(ROOT.glob(name))], script
