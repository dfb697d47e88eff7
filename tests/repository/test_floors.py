"""The house's floors: a room imports only from rooms below it; strings that name modules count."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lcp_plugin"

FLOORS = (  # from the ground up; rooms of one floor know nothing of each other
    "lcp_plugin seeds telling",
    "errors",
    "tasks lora norms",
    "adapter",
    "delta",
    "biases",
    "hooks",
    "strategies observers formats tiny",
    "registry config",
    "data",
    "store",
    "sdxl",
    "delivery training",
    "evaluation",
    "report",
    "run watch",
    "cli kohya doctor",
    "sweep initial",
    "commands",
    "__main__",
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
HEAVY = {"diffusers", "transformers", "peft", "bitsandbytes"}
MODEL_ROOMS = {"sdxl", "training", "evaluation", "delivery", "tiny", "doctor", "kohya"}
NO_IMPORT = {  # strings that read like modules of ours and import nothing
    ("registry", "lcp_plugin.strategies"): "an entry point group",
    ("registry", "lcp_plugin.observers"): "an entry point group",
    ("config.options_train", "lcp_plugin.kohya"): "a value of network_module",
    ("run.record", "lcp_plugin.commands.train"): "a word of the command that run.json records",
}


def name_of(path: Path) -> str:
    """`sdxl.layers` of lcp_plugin/sdxl/layers.py; `sdxl` of its __init__; `lcp_plugin` of ours."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "lcp_plugin"


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


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


def named_modules(path: Path) -> Iterator[str]:
    """Strings of a file that are a module of ours, `module:Class` included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.fullmatch(r"(lcp_plugin(?:\.\w+)+)(?::\w+)?", node.value)
            if found and (name_of(path), found[1]) not in NO_IMPORT:
                yield found[1]


def resolve(name: str) -> str | None:
    """The module of ours that a dotted name is, or is in; None for other packages."""
    if name.split(".")[0] != "lcp_plugin":
        return None
    inner = name.removeprefix("lcp_plugin").removeprefix(".")
    while inner not in MODULES and inner:
        inner = inner.rpartition(".")[0]
    return inner or "lcp_plugin"


def room_of(module: str) -> str:
    """The part of a module's name that the floors are a table of."""
    return module.split(".")[0]


GRAPH = {
    module: {
        found
        for name in [*(n for n, _ in imported_names(path)), *named_modules(path)]
        if (found := resolve(name))
    }
    - {module}
    for module, path in MODULES.items()
}
ROOMS = {room_of(module) for module in MODULES}


def test_the_table_names_every_room_and_nothing_else() -> None:
    assert ROOMS == set(FLOOR_OF)


def test_rooms_import_only_from_rooms_below() -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if room_of(other) != room_of(module)
        and FLOOR_OF[room_of(other)] >= FLOOR_OF[room_of(module)]
    ]
    assert not upward, "\n".join(upward)


def test_what_is_no_import_is_in_the_code() -> None:
    for (module, text), _ in NO_IMPORT.items():
        assert f'"{text}"' in MODULES[module].read_text(encoding="utf-8")


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
def test_model_libraries_are_imported_in_the_rooms_of_models_only(module: str) -> None:
    heavy = {n.split(".")[0] for n, _ in imported_names(MODULES[module])} & HEAVY
    assert not heavy or room_of(module) in MODEL_ROOMS, f"{module} imports {heavy}"


@pytest.mark.parametrize("module", MODULES)
def test_model_libraries_are_imported_inside_functions(module: str) -> None:
    at_start = {n.split(".")[0] for n, inside in imported_names(MODULES[module]) if not inside}
    assert not at_start & HEAVY


@pytest.mark.parametrize("module", ["lcp_plugin", "errors", "seeds", "tasks", "evaluation.scores"])
def test_what_everything_stands_on_needs_the_standard_library_and_numpy_only(module: str) -> None:
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
    assert not used & {"training.loop", "run.runner", "cli"}
