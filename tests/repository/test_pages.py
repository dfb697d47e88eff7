"""The pages: links lead somewhere, code runs, configs load, commands are ones that exist."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from toy_runs import draw_pictures

from lcp_plugin.commands.front import VERBS
from lcp_plugin.config.load import load_config
from lcp_plugin.config.options import option_fields
from lcp_plugin.errors import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NAMES = (
    *("tutorial", "coming_from", "strategies", "write_a_strategy", "evaluation", "files"),
    *("readers", "speed", "gpu", "recall", "api", "design", "questions"),
)
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "configs" / "OPTIONS.md",
    ROOT / "lcp_plugin" / "tiny" / "model" / "README.md",
    *sorted(DOCS.glob("*.md")),
]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """A page's fenced blocks of a language."""
    return [
        textwrap.dedent(body) for _, kind, body in FENCE.findall(text_of(page)) if kind == language
    ]


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text_of(page)))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
        found.add(f"{slug}-{number}" if slug in found else slug)
    return found


def links(page: Path) -> Iterator[str]:
    """Where a page's links and pictures lead."""
    text = FENCE.sub("", text_of(page))
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


# ------------------------------------------------------------------------------------------ links


def test_the_pages_that_errors_name_are_there() -> None:
    assert {path.stem for path in DOCS.glob("*.md")} == set(NAMES)


@pytest.mark.parametrize("place", Page)
def test_the_heading_that_an_error_names_is_there(place: Page) -> None:
    file, _, anchor = place.partition("#")
    assert not anchor or anchor in anchors(ROOT / file)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_and_anchor_resolves(page: Path) -> None:
    broken = []
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_reached_from_readme() -> None:
    reached, open_pages = set(), [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop()
        reached.add(page)
        files = [link.partition("#")[0] for link in links(page) if "://" not in link]
        found = {(page.parent / file).resolve() for file in files if file.endswith(".md")}
        open_pages += [path for path in found if path.exists() and path not in reached]
    assert not [page for page in sorted(DOCS.glob("*.md")) if page not in reached]


def test_pictures_are_small_and_of_this_repository() -> None:
    pictures = [
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text_of(page))
    ]
    assert pictures
    assert all(path.is_relative_to(ROOT) for path in pictures)
    assert not [path for path in pictures if path.stat().st_size > 600_000]


# ------------------------------------------------------------------------------------------- code


def test_the_pages_of_methods_are_those_that_are_trained_with() -> None:
    """Docstrings and comments too: what the page shows is what tests/strategies runs."""
    shown = "\n".join(blocks(DOCS / "write_a_strategy.md", "python"))
    source = text_of(ROOT / "tests" / "proof_strategies.py")
    for name in ("CLora", "OnlineEwc", "SelfDistillation", "named", "denoising_loss"):
        (node,) = [n for n in ast.parse(source).body if getattr(n, "name", "") == name]
        assert ast.get_source_segment(source, node) in shown, name


def test_every_import_of_the_methods_is_needed_and_there() -> None:
    methods = blocks(DOCS / "write_a_strategy.md", "python")[1:-1]
    scope: dict[str, Any] = {"__name__": "methods"}
    exec(compile("\n\n".join(methods), "write_a_strategy.md", "exec", dont_inherit=True), scope)
    imports, used = methods[0], "\n".join(methods[1:])
    names = [alias.asname or alias.name for node in ast.walk(ast.parse(imports))
             if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]  # fmt: skip
    assert not [name for name in names if name != "annotations" and name not in used]
    assert scope["OnlineEwc"](weight=2.0).weight == 2.0


def test_the_first_strategy_and_the_observer_of_the_page_run(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_, last = blocks(DOCS / "write_a_strategy.md", "python")
    (tmp_path / "mine_from_docs.py").write_text(f"{first}\n\n{last}", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"strategy": "mine_from_docs:HalfMerge", "strategy_args": ["keep=0.5"]}
    run = train("run", tasks=(0, 1), observer=["mine_from_docs:Norms"], **options)
    first_folder, second_folder = run.store.folders()
    total = second_folder.read_carry().total
    before, after = first_folder.read_adapter(), second_folder.read_adapter()
    name = next(iter(before))
    expected = 0.5 * before[name].update() + after[name].update()
    assert abs(total[name].dense() - expected).max() < 1e-6
    lines = (run.output_dir / "norms.txt").read_text(encoding="utf-8").split("\n")
    assert lines[1] == f"2 disc1 {total.norm():.6f}"


def test_the_page_of_the_api_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools" / "api_page.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_of_the_api_has_every_public_name() -> None:
    page = text_of(DOCS / "api.md")
    for name in re.findall(r"^## `lcp_plugin\.(\w+)`", page, re.MULTILINE):
        for node in ast.parse(text_of(ROOT / "lcp_plugin" / f"{name}.py")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_":
                assert re.search(rf"^### (class )?`{node.name}\b", page, re.MULTILINE), node.name


# ---------------------------------------------------------------------------- configs and commands


@pytest.mark.parametrize(
    ("page", "text"),
    [(page, text) for page in PAGES for text in blocks(page, "toml")],
    ids=lambda value: name_of(value) if isinstance(value, Path) else "config",
)
def test_every_config_of_the_pages_loads(page: Path, text: str, tmp_path: Path) -> None:
    for folder in re.findall(r'image_dir = "([^"]+)"', text):
        draw_pictures(tmp_path / folder)
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    config = load_config(["--config", str(path), "--strict_config"])
    assert config.tasks


def shell_commands(page: Path) -> list[list[str]]:
    """The commands of a page's shell blocks, comments left out and continued lines joined."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_path_that_commands_name_exists(page: Path) -> None:
    words = [word for command in shell_commands(page) for word in command]
    paths = [word for word in words if word.startswith(("configs/", "tools/", "tests/"))]
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_verb_and_option_that_commands_name_exists(page: Path) -> None:
    for command in shell_commands(page):
        if command[0] != "lcp" or len(command) == 1:
            continue
        verb, *words = command[1:]
        assert verb in VERBS, command
        parser = import_module(VERBS[verb].path).build_parser()
        known = set(parser._option_string_actions) | {"--help"}
        if verb in ("train", "compare", "sweep"):  # what a sweep does not know goes to training
            known |= {f"--{name}" for name in option_fields()}
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= known, command


def test_the_options_of_other_trainers_go_to_options_that_exist() -> None:
    known = {
        *option_fields(),
        *("name", "image_dir", "concept", "train_prompt", "num_repeats", "is_reg"),
        *("custom_attributes", "tasks"),
    }
    sections = text_of(DOCS / "coming_from.md").split("\n## ")
    for section in sections[3:5]:  # OneTrainer, ai-toolkit
        cells = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")]
        named = {word for cell in cells[1:] for word in re.findall(r"`\[*(\w+)\]*`", cell)}
        assert len(named) > 15
        assert named - {"5_sneaker"} <= known, named - known


def test_ten_questions_each_have_a_page_that_answers_and_a_thread_that_asks() -> None:
    questions = text_of(DOCS / "questions.md").split("\n## ")[1:]
    assert len(questions) == 10
    for question in questions:
        answer, _, rest = question.partition("→")
        assert 2 <= len(answer.strip().splitlines()[1:]) <= 6, question
        assert ".md" in rest
        assert "https://github.com/" in rest
