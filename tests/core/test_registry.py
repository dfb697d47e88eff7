"""Names to plugins: built-ins, installed packages, paths; mistakes are one clear line."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from plugin_samples import PLUGIN, Whole

from lcp_plugin.adapter import Adapter, AdapterSpec
from lcp_plugin.errors import StrategyError
from lcp_plugin.hooks import Carry, Observer, Strategy, TaskStart
from lcp_plugin.observers import BUILT_IN as OBSERVERS
from lcp_plugin.registry import (
    cast_value,
    check_plugin,
    create,
    create_strategy,
    describe_strategies,
    find,
    list_names,
)
from lcp_plugin.strategies import BUILT_IN as STRATEGIES
from lcp_plugin.tasks import Task

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(package, entry points, source): what `pip install` leaves in a folder, by hand."""

    def write(package: str, points: dict[str, list[str]], source: str = PLUGIN) -> Path:
        site = tmp_path / f"site_{package}"
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{package}.py").write_text(source, encoding="utf-8")
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        sections = (f"[{group}]\n" + "\n".join(lines) for group, lines in points.items())
        (info / "entry_points.txt").write_text("\n".join(sections) + "\n", encoding="utf-8")
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, package, raising=False)
        return site

    return write


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """module(name, source): an importable module."""

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


# ------------------------------------------------------------------------------------- built-ins


@pytest.mark.parametrize("name", STRATEGIES)
def test_built_in_strategies_are_found_by_name(name: str) -> None:
    strategy = create_strategy(name)
    assert type(strategy) is STRATEGIES[name]
    assert strategy.name == name


@pytest.mark.parametrize("name", OBSERVERS)
def test_built_in_observers_are_found_by_name(name: str) -> None:
    assert type(create(Observer, name)) is OBSERVERS[name]


def test_built_ins_themselves_fit_the_hooks() -> None:
    for strategy in STRATEGIES.values():
        assert check_plugin(Strategy, strategy) is strategy  # type: ignore[type-abstract]
    for observer in OBSERVERS.values():
        assert check_plugin(Observer, observer) is observer


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("merge_int", "no strategy is called 'merge_int'; did you mean 'merge_init'"),
        ("mag_max", "did you mean 'magmax'"),
        ("zzz", "known: naive, merge_init"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name: str, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        create_strategy(name)


def test_observers_get_their_own_suggestions() -> None:
    with pytest.raises(StrategyError, match="no observer is called 'json'; did you mean 'jsonl'"):
        create(Observer, "json")


# ------------------------------------------------------------------------------------- arguments


def test_arguments_are_cast_by_their_annotations() -> None:
    strategy: Any = create_strategy("magmax", ["scale=0.25", "reference=original"])
    assert (strategy.scale, strategy.reference) == (0.25, "original")
    strategy = create_strategy("magmax", ["scale=none"])
    assert strategy.scale == 1.0


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("true", bool, True),
        ("No", bool, False),
        ("3", int, 3),
        ("1e-3", float, 1e-3),
        ("a=b", str, "a=b"),
        ("none", float | None, None),
        ("2.5", float | None, 2.5),
        ("7", int | str, 7),
        ("seven", int | str, "seven"),
        ("2", Literal[1, 2], 2),
    ],
)
def test_values_are_cast(text: str, annotation: Any, value: Any) -> None:
    got = cast_value(text, annotation, "x")
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation"), [("maybe", bool), ("3.5", int), ("x", float), ("c", Literal["a", "b"])]
)
def test_values_that_do_not_fit_are_an_error(text: str, annotation: Any) -> None:
    with pytest.raises(StrategyError, match=f"magmax: scale = '{text}'"):
        cast_value(text, annotation, "magmax: scale")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["scal=2"], "magmax has no argument 'scal'; did you mean 'scale'"),
        (["scale"], "should read key=value"),
        (["scale=big"], "magmax: scale = 'big' is not"),
        (["scale=1", "zzz=1"], "known: reference, scale, init"),
    ],
)
def test_wrong_arguments_are_one_line(args: list[str], message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        create_strategy("magmax", args)


def test_an_argument_without_default_must_be_given(module: Callable[[str, str], None]) -> None:
    module(
        "needy",
        """
        from plugin_samples import Whole
        class Needy(Whole):
            def __init__(self, weight: float) -> None:
                self.weight = weight
        """,
    )
    with pytest.raises(StrategyError, match=r"needs --strategy_args weight=\.\.\."):
        create_strategy("needy:Needy")
    strategy: Any = create_strategy("needy:Needy", ["weight=2"])
    assert strategy.weight == 2.0


# ---------------------------------------------------------------------------- package.module:Class


def test_a_class_by_path_is_loaded_and_named(module: Callable[[str, str], None]) -> None:
    module("beside_the_config", PLUGIN)
    strategy: Any = create_strategy("beside_the_config:Halving", ["factor=0.1"])
    assert strategy.factor == 0.1
    assert type(create(Observer, "beside_the_config:Counting")).__name__ == "Counting"


def test_a_plugin_is_called_by_what_finds_it_again(
    module: Callable[[str, str], None], install: Install
) -> None:
    """Task folders record the name, and rebuilding a carry creates the strategy by it."""
    module("beside_the_config", PLUGIN)
    install("halving_pkg", {"lcp_plugin.strategies": ["in_halves = halving_pkg:Halving"]})
    for name in ("beside_the_config:Halving", "in_halves", "plugin_samples:Whole"):
        strategy = create_strategy(name)
        assert strategy.name == name
        assert type(create_strategy(strategy.name)) is type(strategy)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:Halving", "cannot import no_such_module"),
        ("plugin_samples:Nothing", "plugin_samples has no 'Nothing'"),
        ("plugin_samples:PLUGIN", "is not a subclass of lcp_plugin.hooks.Strategy"),
        ("lcp_plugin.observers:Console", "is not a subclass of lcp_plugin.hooks.Strategy"),
        ("lcp_plugin.hooks:Strategy", "does not define begin_task, end_task"),
    ],
)
def test_a_wrong_path_is_one_line(path: str, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        create_strategy(path)


def test_a_module_that_raises_while_imported_is_one_line(
    module: Callable[[str, str], None],
) -> None:
    module("broken_plugin", "1 / 0")
    with pytest.raises(StrategyError, match="cannot import broken_plugin: division by zero"):
        create_strategy("broken_plugin:Halving")


# ------------------------------------------------------------------------------------- signatures


def test_an_annotation_that_only_a_type_checker_knows_is_one_line(
    module: Callable[[str, str], None],
) -> None:
    source = """
        from __future__ import annotations
        from typing import TYPE_CHECKING
        from lcp_plugin.strategies.merge_init import MergeInit
        if TYPE_CHECKING:
            from somewhere import Strength

        class Faded(MergeInit):
            def __init__(self, strength: Strength = 1) -> None:
                pass
    """
    module("hidden_annotation", source)
    with pytest.raises(StrategyError, match="'Strength' is not defined.*outside of"):
        create_strategy("hidden_annotation:Faded")


def test_a_wrong_signature_shows_both() -> None:
    class Wrong(Whole):
        def end_task(self, task: Task, trained: Adapter) -> Carry:  # type: ignore[override]
            return Carry()

    wanted = r"end_task\(self, task, trained\) does not fit; wanted end_task\(self, task, carry, t"
    with pytest.raises(StrategyError, match=wanted):
        check_plugin(Strategy, Wrong)  # type: ignore[type-abstract]


def test_swapped_parameters_are_noticed() -> None:
    class Swapped(Whole):
        def before_backward(self, loss: Any, step: Any) -> Any:
            return loss

    with pytest.raises(StrategyError, match=r"before_backward\(self, loss, step\)"):
        check_plugin(Strategy, Swapped)  # type: ignore[type-abstract]


def test_further_parameters_need_defaults() -> None:
    class More(Whole):
        def before_training(self, model: Any, extra: int) -> None: ...  # type: ignore[override]

    class Fine(Whole):
        def before_training(self, model: Any, extra: int = 1) -> None: ...

    with pytest.raises(StrategyError, match="before_training"):
        check_plugin(Strategy, More)  # type: ignore[type-abstract]
    assert check_plugin(Strategy, Fine) is Fine  # type: ignore[type-abstract]


def test_a_hook_that_is_no_function_is_noticed() -> None:
    class Odd(Whole):
        before_backward = None  # type: ignore[assignment]

    with pytest.raises(StrategyError, match="before_backward"):
        check_plugin(Strategy, Odd)  # type: ignore[type-abstract]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("before_backwards", "before_backward"), ("after_optimiser_step", "after_optimizer_step")],
)
def test_a_misspelt_hook_gets_a_suggestion(wrong: str, right: str) -> None:
    def hook(self: Any, *args: Any) -> None: ...

    misspelt = type("Misspelt", (Whole,), {wrong: hook})
    with pytest.raises(StrategyError, match=f"'{wrong}' is no hook; did you mean '{right}'"):
        check_plugin(Strategy, misspelt)  # type: ignore[type-abstract]
    child = type("Child", (misspelt,), {})
    with pytest.raises(StrategyError, match=f"'{wrong}' is no hook"):
        check_plugin(Strategy, child)  # type: ignore[type-abstract]


def test_a_misspelt_observer_hook_gets_a_suggestion() -> None:
    class Misspelt(Observer):
        def on_task_ends(self, run: Any, task: Any, carry: Any) -> None: ...

    with pytest.raises(StrategyError, match="did you mean 'on_task_end'"):
        check_plugin(Observer, Misspelt)


def test_a_missing_required_hook_is_named() -> None:
    class Half(Strategy):
        def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
            return TaskStart(base=carry.total, adapter=spec.gaussian())

    with pytest.raises(StrategyError, match="strategy Half does not define end_task"):
        check_plugin(Strategy, Half)  # type: ignore[type-abstract]


# ----------------------------------------------------------------------------- installed packages


def test_an_installed_packages_strategy_and_observer_run_by_name(install: Install) -> None:
    install(
        "halving_pkg",
        {
            "lcp_plugin.strategies": ["halving = halving_pkg:Halving"],
            "lcp_plugin.observers": ["counting = halving_pkg:Counting"],
        },
    )
    strategy: Any = create_strategy("halving", ["factor=0.25"])
    assert type(strategy).__module__ == "halving_pkg"
    assert strategy.factor == 0.25
    assert "halving" in list_names(Strategy)  # type: ignore[type-abstract]
    assert type(create(Observer, "counting")).__name__ == "Counting"
    with pytest.raises(StrategyError, match="did you mean 'halving'"):
        create_strategy("halvin")


def test_two_packages_that_claim_one_name_are_an_error_naming_both(install: Install) -> None:
    for package in ("one_pkg", "two_pkg"):
        install(package, {"lcp_plugin.strategies": [f"halving = {package}:Halving"]})
    with pytest.raises(StrategyError, match="'halving' is claimed by both") as caught:
        create_strategy("halving")
    assert "one_pkg" in str(caught.value)
    assert "two_pkg" in str(caught.value)


def test_a_package_that_claims_a_built_ins_name_is_an_error(install: Install) -> None:
    install("thief_pkg", {"lcp_plugin.strategies": ["magmax = thief_pkg:Halving"]})
    with pytest.raises(StrategyError, match="'magmax' is claimed by both lcp_plugin and thief_pkg"):
        create_strategy("no_built_in")


def test_our_own_entry_points_do_not_collide_with_the_built_ins(install: Install) -> None:
    points = [f"{n} = {c.__module__}:{c.__qualname__}" for n, c in STRATEGIES.items()]
    install("lcp_twin", {"lcp_plugin.strategies": points})
    assert list_names(Strategy) == list(STRATEGIES)  # type: ignore[type-abstract]


def test_an_installed_plugin_that_cannot_be_imported_is_one_line(install: Install) -> None:
    points = {"lcp_plugin.strategies": ["halving = broken_pkg:Halving"]}
    install("broken_pkg", points, source="import no_such_library")
    with pytest.raises(StrategyError, match="strategy 'halving' cannot be imported: No module"):
        create_strategy("halving")


def test_an_installed_plugin_is_checked_like_any_other(install: Install) -> None:
    source = PLUGIN.replace("def end_task(self, task, carry, trained)", "def end_task(self, carry)")
    install("wrong_pkg", {"lcp_plugin.strategies": ["halving = wrong_pkg:Halving"]}, source)
    with pytest.raises(StrategyError, match=r"end_task\(self, carry\) does not fit"):
        find(Strategy, "halving")  # type: ignore[type-abstract]


# ---------------------------------------------------------------------------------- the catalogue


def test_the_list_of_strategies_shows_every_option_and_one_line_each(install: Install) -> None:
    install("halving_pkg", {"lcp_plugin.strategies": ["halving = halving_pkg:Halving"]})
    text = describe_strategies()
    blocks: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line.startswith(" "):
            blocks[line.split()[0]] = []
        blocks[list(blocks)[-1]].append(line)
    assert list(blocks) == [*STRATEGIES, "halving"]
    assert all(len(lines) == 2 for lines in blocks.values())
    expected = "options: merge=exact, mode=column, scale=unit, init=gaussian"
    assert blocks["merge_ortho_init"][1].strip() == expected
    assert blocks["magmax"][1].strip() == "options: reference=running, scale=None, init=gaussian"
    assert "Every boundary halves what was there." in blocks["halving"][0]
    assert "summary" not in text
    assert blocks["halving"][1].strip() == "options: factor=0.5, tag=x"


def test_the_list_survives_one_broken_package(install: Install) -> None:
    points = {"lcp_plugin.strategies": ["halving = broken_pkg:Halving"]}
    install("broken_pkg", points, source="import no_such_library")
    text = describe_strategies()
    assert "merge_init" in text
    assert "halving" in text
    assert "No module named 'no_such_library'" in text
