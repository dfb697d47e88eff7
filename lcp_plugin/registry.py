"""Names to strategies and observers: built-ins, installed entry points, `package.module:Class`.

Signatures of overridden hooks are compared with the base class when a plugin is loaded, and
--strategy_args are cast from the annotations of `__init__`, so a mistake is one line before any
model is loaded.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from lcp_plugin.errors import Page, StrategyError, explaining
from lcp_plugin.hooks import Observer, Strategy

Plugin = TypeVar("Plugin", Strategy, Observer)
PAGES: Mapping[str, Page] = {"recall": Page.RECALL}  # of strategies that have one of their own
GROUPS: Mapping[type, str] = {
    Strategy: "lcp_plugin.strategies",
    Observer: "lcp_plugin.observers",
}


def _built_in(kind: type[Plugin]) -> dict[str, type[Plugin]]:
    module = importlib.import_module(GROUPS[kind])
    found: dict[str, type[Plugin]] = module.BUILT_IN
    return found


def _installed(kind: type[Plugin]) -> dict[str, Any]:
    """Entry points by name.

    Raises:
        StrategyError: two packages claim a name, or one claims a built-in's name for another class.
    """
    built_in = _built_in(kind)
    found: dict[str, Any] = {}
    for point in entry_points(group=GROUPS[kind]):
        known = built_in.get(point.name)
        if known is not None and point.value == f"{known.__module__}:{known.__qualname__}":
            continue  # ours, seen through the installed package
        if known is not None or (point.name in found and found[point.name].value != point.value):
            other = "lcp_plugin" if known is not None else _package_of(found[point.name])
            raise StrategyError(
                f"'{point.name}' is claimed by both {other} and {_package_of(point)}; "
                "uninstall one or use package.module:Class."
            )
        found[point.name] = point
    return found


def _package_of(point: Any) -> str:
    return point.dist.name if point.dist is not None else str(point.value)


def list_names(kind: type[Plugin]) -> list[str]:
    """All names that `find` knows, built-ins first."""
    return [*_built_in(kind), *sorted(_installed(kind))]


def find(kind: type[Plugin], name: str) -> type[Plugin]:
    """The class behind a name, checked against its base.

    Raises:
        StrategyError: unknown name (with a suggestion), import failure, wrong type or signature.
    """
    what = kind.__name__.lower()
    if ":" in name:
        with explaining(Page.OBSERVERS if kind is Observer else Page.HOOKS, StrategyError):
            return check_plugin(kind, _load_path(name, what))
    if name in _built_in(kind):
        return _built_in(kind)[name]
    installed = _installed(kind)
    if name in installed:
        try:
            loaded = installed[name].load()
        except Exception as error:
            raise StrategyError(f"{what} '{name}' cannot be imported: {error}") from error
        return check_plugin(kind, loaded)
    names = list_names(kind)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"
    raise StrategyError(f"no {what} is called '{name}'; {hint} (or package.module:Class)")


def _load_path(path: str, what: str) -> Any:
    module_name, _, class_name = path.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a strategy in a file beside the config
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise StrategyError(f"{what} '{path}': cannot import {module_name}: {error}") from error
    try:
        return getattr(module, class_name)
    except AttributeError:
        raise StrategyError(f"{what} '{path}': {module_name} has no '{class_name}'.") from None


def check_plugin(kind: type[Plugin], loaded: Any) -> type[Plugin]:
    """`loaded` itself if it is a concrete `kind` whose hooks have the base's parameters."""
    label = f"{kind.__name__.lower()} {getattr(loaded, '__name__', loaded)!s}"
    if not (inspect.isclass(loaded) and issubclass(loaded, kind)):
        raise StrategyError(f"{label} is not a subclass of lcp_plugin.hooks.{kind.__name__}.")
    missing = sorted(getattr(loaded, "__abstractmethods__", ()))
    if missing:
        raise StrategyError(f"{label} does not define {', '.join(missing)}.")
    for hook, method in inspect.getmembers(kind, inspect.isfunction):
        if not hook.startswith("_"):
            _check_signature(label, hook, method, getattr(loaded, hook))
    for name, _ in inspect.getmembers(loaded, inspect.isfunction):
        if name.startswith(("on_", "before_", "after_")) and not hasattr(kind, name):
            hooks = [n for n in vars(kind) if not n.startswith("_")]
            near = difflib.get_close_matches(name, hooks, n=1)
            hint = f" did you mean '{near[0]}'?" if near else ""
            raise StrategyError(f"{label}: '{name}' is no hook;{hint or ' rename it.'}")
    return loaded


def _check_signature(label: str, hook: str, base: Any, own: Any) -> None:
    if not callable(own):
        raise StrategyError(f"{label}: {hook} = {own!r} is no function; leave the hook out.")
    wanted = [p for p in inspect.signature(base).parameters]
    got = list(inspect.signature(own).parameters.values())
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in got):
        return
    required = [p.name for p in got if p.default is p.empty]
    if [p.name for p in got][: len(wanted)] != wanted or len(required) > len(wanted):
        names = ", ".join(p.name for p in got)
        raise StrategyError(
            f"{label}: {hook}({names}) does not fit; wanted {hook}({', '.join(wanted)})."
        )


def create_strategy(name: str, args: Sequence[str] = ()) -> Strategy:
    """A strategy by name with its `k=v` arguments (`create`)."""
    return create(Strategy, name, args)  # type: ignore[type-abstract]


def describe_strategies() -> str:
    """Every strategy with its options (`describe`)."""
    return describe_plugins(Strategy)  # type: ignore[type-abstract]


def create(kind: type[Plugin], name: str, args: Sequence[str] = ()) -> Plugin:
    """An instance, its arguments cast from `k=v` strings by the annotations of `__init__`.

    Raises:
        StrategyError: unknown argument (with a suggestion), wrong value, missing argument.
    """
    usual = Page.OBSERVERS if kind is Observer else Page.STRATEGIES
    with explaining(PAGES.get(name, usual), StrategyError):
        return _create(find(kind, name), name, args)


def _create(cls: type[Plugin], name: str, args: Sequence[str]) -> Plugin:
    values: dict[str, Any] = {}
    known = describe_arguments(cls)
    for text in args:
        key, equals, raw = text.partition("=")
        if not equals:
            raise StrategyError(f"{name}: argument '{text}' should read key=value.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"
            raise StrategyError(f"{name} has no argument '{key}'; {hint}")
        values[key] = cast_value(raw, known[key][0], f"{name}: {key}")
    lacking = [k for k, (_, d) in known.items() if d is inspect.Parameter.empty and k not in values]
    if lacking:
        raise StrategyError(f"{name} needs --strategy_args {' '.join(k + '=...' for k in lacking)}")
    plugin = cls(**values)
    plugin.name = name  # what it was found by: files record it, and replaying finds it again
    return plugin


def describe_arguments(cls: type[Any]) -> dict[str, tuple[Any, Any]]:
    """name -> (annotation, default) of the arguments of `__init__`."""
    if cls.__init__ is object.__init__:
        return {}
    try:
        hints = typing.get_type_hints(cls.__init__)
    except NameError as error:
        raise StrategyError(
            f"{cls.__name__}.__init__ is annotated with a name that its module does not import "
            f"when it runs ({error}); import it outside of `if TYPE_CHECKING`."
        ) from None
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {
        p.name: (hints.get(p.name, str), p.default)
        for p in parameters
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def cast_value(text: str, annotation: Any, label: str) -> Any:
    """`text` as bool, int, float, str, None, a Literal's value, a strategy with its own arguments
    ("merge_ortho_init mode=row_null"), or one of a union's types.
    """
    options = typing.get_args(annotation)
    if Strategy in (annotation, *options):
        name, *args = text.split() or [text]
        return create_strategy(name, args)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        for value in options:
            if str(value) == text:
                return value
        raise StrategyError(f"{label} = '{text}'; use one of {', '.join(map(str, options))}.")
    if origin in (typing.Union, types.UnionType):
        for option in options:
            try:
                return cast_value(text, option, label)
            except StrategyError:
                continue
        raise StrategyError(f"{label} = '{text}' is not {annotation}.")
    try:
        return _cast_plain(text, annotation)
    except (ValueError, KeyError):
        wanted = getattr(annotation, "__name__", annotation)
        raise StrategyError(f"{label} = '{text}' is not of type {wanted}.") from None


def _cast_plain(text: str, annotation: Any) -> Any:
    if annotation is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
            text.lower()
        ]
    if annotation is type(None):
        return {"none": None, "": None}[text.lower()]
    if annotation in (int, float):
        return annotation(text)
    return text


def describe_plugins(kind: type[Plugin]) -> str:
    """Every plugin with its options and the first line of its docstring, for --list_strategies."""
    return "\n".join(_describe_plugin(kind, name) for name in list_names(kind))


def _describe_plugin(kind: type[Plugin], name: str) -> str:
    try:
        cls = find(kind, name)
    except StrategyError as error:  # one broken package does not hide the others
        return f"{name:<18} cannot be used: {error}"
    summary = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    options = ", ".join(
        key if default is inspect.Parameter.empty else f"{key}={getattr(default, 'name', default)}"
        for key, (_, default) in describe_arguments(cls).items()
    )
    return f"{name:<18} {summary}" + (f"\n{'':<18} options: {options}" if options else "")
