"""The laws of CONTRIBUTING, each with the tests that prove it where a user meets it.

A law is proven by what goes through a door: the command line, a run, a tool. Tests of helpers stand
beside these and say sooner where it broke; they are not listed.
"""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOORS = {"main", "execute", "attempt"}  # a command's main, a run, the command in processes
LAWS = {
    1: (
        "run/test_chaining.py::test_chained_runs_equal_one_run_bit_for_bit",
        "run/test_chaining.py::test_a_chain_on_the_deliverable_equals_a_chain_on_the_folder",
        "run/test_chaining.py::test_earlier_carries_are_rebuilt_bit_for_bit",
    ),
    2: (
        "run/test_run_killed.py::test_a_run_killed_five_times_ends_as_if_it_had_not_been",
        "run/test_run_killed.py::test_a_run_killed_anywhere_ends_as_if_it_had_not_been",
        "run/test_run_killed.py::test_sigterm_saves_first_and_the_same_command_goes_on",
        "run/test_run_refused.py::test_a_changed_config_refuses_to_resume_and_names_the_keys",
        "run/test_chaining.py::test_tasks_appended_to_a_finished_run_continue_it",
    ),
    3: (
        "run/test_chaining.py::"
        "test_a_chained_task_starts_at_what_base_plus_carry_predicts_and_keeps_its_inputs",
    ),
    4: (
        "run/test_run.py::"
        "test_the_deliverable_in_diffusers_does_what_the_model_after_the_boundary_does",
        "delivery/test_checkpoints.py::"
        "test_a_checkpoint_holds_the_base_weights_that_the_run_was_trained_on",
        "delivery/test_file_tools.py::test_the_export_tool_truncates_and_weighs",
        "formats/test_read_back.py::test_a_deliverable_that_does_not_read_back_leaves_the_old_one",
    ),
    5: (  # bit for bit: W + D - D would differ from what a chained run reads anew
        "run/test_chaining.py::test_chained_runs_equal_one_run_bit_for_bit",
        "sdxl/test_stored.py::test_a_chain_on_a_stored_base_learns_and_delivers_its_updates_in_full",
    ),
    6: (
        "run/test_chaining.py::test_a_run_chains_on_anyones_lora",
        "run/test_run_options.py::test_an_update_is_scaled_by_network_alpha_over_network_dim",
        "delivery/test_file_tools.py::test_the_merge_tool_sums_exactly_and_names_its_parents",
    ),
    7: (
        "run/test_chaining.py::"
        "test_a_chained_task_starts_at_what_base_plus_carry_predicts_and_keeps_its_inputs",
        "run/test_circumstances.py::test_a_run_with_its_states_pickles_nothing",
    ),
    8: (
        "run/test_bad_input.py::test_a_base_that_is_not_sdxl_is_refused",
        "run/test_bad_input.py::test_a_truncated_parent_is_refused",
        "run/test_bad_input.py::test_an_unreadable_image_is_named",
        "run/test_run_refused.py::test_nan_stops_the_run_and_keeps_the_last_good_state",
        "store/test_starting_over.py::test_what_would_be_lost_is_refused_and_overwrite_starts_over",
    ),
    9: (
        "run/test_circumstances.py::test_a_run_asks_nothing_of_a_network",
        "run/test_run.py::test_xformers_missing_is_one_warning_and_sdpa",
    ),
    10: (
        "run/test_circumstances.py::"
        "test_neither_global_generators_nor_workers_change_what_is_learned_and_drawn",
    ),
    11: ("repository/test_laws.py::test_a_law_is_proven_through_a_door",),
    12: (".ci/roundings",),  # all tests, under other instructions and numbers of threads
}
RUNS = [(law, test) for law, tests in LAWS.items() if law < 11 for test in tests]


@cache
def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    """The functions at the top of a file, by name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def names_used(function: ast.FunctionDef) -> set[str]:
    """What a function asks for (its fixtures) and what it calls."""
    called = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in called}
    marks = re.findall(r"\w+", " ".join(map(ast.unparse, function.decorator_list)))
    return names | set(marks) | {argument.arg for argument in function.args.args}


def passes_a_door(name: str, file: Path) -> bool:
    """Whether a test gets to a command or a run, by itself, its fixtures or the tests' helpers."""
    helpers = [file, *file.parent.glob("conftest.py"), *(ROOT / "tests").glob("*.py")]
    known: dict[str, ast.FunctionDef] = {}
    for path in reversed(helpers):
        known |= functions_of(path)
    open_, seen = [name], set[str]()
    while open_:
        found = open_.pop()
        if found in DOORS:
            return True
        if found in known and found not in seen:
            open_ += names_used(known[found])
        seen.add(found)
    return False


def test_every_law_is_in_the_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    laws = text.split("## Laws")[1].split("## Style")[0]
    assert [int(n) for n in re.findall(r"^(\d+)\. ", laws, re.MULTILINE)] == list(LAWS)


@pytest.mark.parametrize(("law", "test"), RUNS, ids=[f"{n}-{t.split('::')[1]}" for n, t in RUNS])
def test_a_law_is_proven_through_a_door(law: int, test: str) -> None:
    path, name = test.split("::")
    file = ROOT / "tests" / path
    assert name in functions_of(file), f"law {law} names {test}, which is not there"
    assert passes_a_door(name, file), f"law {law}: {test} calls neither a command nor a run"


def test_the_script_that_tries_other_roundings_can_be_run() -> None:
    assert all(os.access(ROOT / script, os.X_OK) for script in LAWS[12])
