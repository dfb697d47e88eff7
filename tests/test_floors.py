"""The house's floors: a module imports from lower floors, or in one direction on its own."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lcp_plugin"

FLOORS: dict[int, tuple[str, ...]] = {  # a longer name beats the package that it is in
    0: ("lcp_plugin", "errors", "tasks", "seeds", "evaluation.scores"),
    1: ("lora", "adapter", "delta", "norms", "files", "pictures", "evaluation.tables")
    + ("report",),
    2: ("families", "hooks", "keys", "lineage", "header", "foreign_header", "merging"),
    3: ("strategies", "observers", "registry"),
    4: ("lycoris", "peft_config", "formats", "store", "config"),
    5: (
        "sdxl",
        "data",
        "optimizer_args",
        "schedules",
        "tiny",
        "parallel",
        "provenance",
        "conflicts",
    )
    + ("streaming", "session", "lock"),
    6: (
        "hardware",
        "optim",
        "trainer_state",
        "rates_course",
        "starting",
        "restarting",
        "heading",
        "interim",
        "task_run",
    )
    + ("trainer", "evaluation", "samples", "kohya", "fusing", "export", "planning", "bench")
    + ("doctor", "chaining", "parent_prompts", "data_facts", "retraining"),
    7: ("runner", "closing", "measuring", "measure_report"),
    8: ("cli",),
}
HEAVY = {"diffusers", "transformers", "peft", "bitsandbytes"}


def name_of(path: Path) -> str:
    """`sdxl.layers` of lcp_plugin/sdxl/layers.py; `sdxl` of its __init__; `lcp_plugin` of ours."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "lcp_plugin"


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def floor_of(module: str) -> int | None:
    """The floor of the longest name in the table that the module is or lies in."""
    named = {name: floor for floor, names in FLOORS.items() for name in names}
    fits = [n for n in named if module == n or module.startswith(n + ".")]
    return named[max(fits, key=len)] if fits else None


def imported_names(path: Path) -> Iterator[tuple[str, bool]]:
    """Absolute dotted names a file imports when it runs, and whether inside a function.

    What stands under `if TYPE_CHECKING` is left out.
    """

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((f"{node.module}.{alias.name}", inside) for alias in node.names)
        inside = inside or isinstance(node, ast.FunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return walk(ast.parse(path.read_text(encoding="utf-8")), False)


def resolve(name: str) -> str | None:
    """The module of ours that a dotted name is, or is in; None for other packages."""
    if name.split(".")[0] != "lcp_plugin":
        return None
    inner = name.removeprefix("lcp_plugin").removeprefix(".")
    while inner not in MODULES and inner:
        inner = inner.rpartition(".")[0]
    return inner or "lcp_plugin"


GRAPH = {
    module: {found for name, _ in imported_names(path) if (found := resolve(name))} - {module}
    for module, path in MODULES.items()
}


def test_every_module_has_a_floor() -> None:
    homeless = [module for module in MODULES if floor_of(module) is None]
    assert not homeless, f"place these in FLOORS: {homeless}"


def test_the_table_names_only_what_exists() -> None:
    assert not [n for names in FLOORS.values() for n in names if n not in MODULES]


def test_modules_import_only_from_their_own_floor_and_lower_ones() -> None:
    upward = [
        f"{module} ({floor_of(module)}) imports {other} ({floor_of(other)})"
        for module, others in GRAPH.items()
        for other in others
        if (floor_of(other) or 0) > (floor_of(module) or 0)
    ]
    assert not upward, "\n".join(upward)


def test_imports_at_start_go_round_in_no_circle() -> None:
    done: set[str] = set()
    at_start = {
        module: {r for n, inside in imported_names(path) if not inside and (r := resolve(n))}
        for module, path in MODULES.items()
    }

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for other in sorted(at_start[module] - {module}):
                visit(other, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_model_libraries_are_imported_on_floors_five_and_six_only(module: str) -> None:
    heavy = {n.split(".")[0] for n, _ in imported_names(MODULES[module])} & HEAVY
    assert not heavy or floor_of(module) in (5, 6), f"{module} imports {heavy}"


@pytest.mark.parametrize("module", MODULES)
def test_model_libraries_are_imported_inside_functions(module: str) -> None:
    at_start = {n.split(".")[0] for n, inside in imported_names(MODULES[module]) if not inside}
    assert not at_start & HEAVY


@pytest.mark.parametrize("module", [m for m in MODULES if floor_of(m) == 0])
def test_the_ground_floor_needs_the_standard_library_and_numpy_only(module: str) -> None:
    outside = {n.split(".")[0] for n, _ in imported_names(MODULES[module])}
    allowed = set(sys.stdlib_module_names) | {"numpy", "lcp_plugin"}
    assert outside <= allowed, outside - allowed


@pytest.mark.parametrize("module", ["lora", "adapter", "delta"])
def test_the_mathematics_needs_torch_only(module: str) -> None:
    outside = {n.split(".")[0] for n, _ in imported_names(MODULES[module])}
    assert outside <= set(sys.stdlib_module_names) | {"torch", "lcp_plugin"}


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_tools_import_neither_trainer_nor_runner_nor_cli(tool: Path) -> None:
    used = {resolve(name) for name, _ in imported_names(tool)}
    assert not used & {"trainer", "runner", "cli"}
