"""A run whose paths Windows would refuse is told so before it begins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from config_texts import HEAD, TASK

from lcp_plugin.config.load import RunConfig
from lcp_plugin.errors import ConfigError

Load = Callable[..., RunConfig]
LONG = "d" * 200  # of a folder: every system takes it


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Windows, whose registry holds nothing as yet."""
    values: dict[str, int] = {}

    def query(key: object, name: str) -> tuple[int, int]:
        if name not in values:
            raise OSError(2, "not found")
        return values[name], 4

    class Key:
        def __enter__(self) -> Key:
            return self

        def __exit__(self, *error: object) -> None:
            return None

    fake = SimpleNamespace(HKEY_LOCAL_MACHINE=1, OpenKey=lambda *place: Key(), QueryValueEx=query)
    monkeypatch.setitem(sys.modules, "winreg", fake)
    monkeypatch.setattr("lcp_plugin.config.path_lengths.sys", SimpleNamespace(platform="win32"))
    return values


@pytest.mark.usefixtures("registry")
def test_what_is_too_long_and_what_to_shorten_is_one_line(load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load(HEAD + TASK, "--output_dir", LONG, "--output_name", "mine")
    (told,) = caught.value.problems
    assert told.startswith("command line: output_dir: the longest path of this run has ")
    assert "Windows takes 259: " in told
    assert f"{LONG}/mine/" in told.replace("\\", "/")
    assert "; shorten output_dir, output_name or the task's name 'dog' by " in told
    assert told.endswith(" in all, or set LongPathsEnabled in Windows' registry.")


@pytest.mark.usefixtures("registry")
def test_as_many_characters_less_as_it_tells_are_enough(load: Load) -> None:
    name = "x" * 30
    text = HEAD + TASK.replace('"dog"', f'"{name}"')
    with pytest.raises(ConfigError, match=f"name '{name}' by ") as caught:
        load(text, "--output_dir", LONG)
    too_many = int(caught.value.problems[0].split(f"{name!r} by ")[1].split()[0])
    with pytest.raises(ConfigError, match=" by 1 in all"):
        load(text, "--output_dir", LONG[: 1 - too_many])
    assert load(text, "--output_dir", LONG[:-too_many]).tasks[0].name == name


def test_windows_that_was_told_to_take_any_path_takes_it(
    load: Load, registry: dict[str, int]
) -> None:
    registry["LongPathsEnabled"] = 1
    assert load(HEAD + TASK, "--output_dir", LONG).options.output_dir == LONG
    registry["LongPathsEnabled"] = 0
    with pytest.raises(ConfigError, match="LongPathsEnabled"):
        load(HEAD + TASK, "--output_dir", LONG)


def test_elsewhere_no_path_is_too_long(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    for system in ("linux", "darwin"):
        fake = SimpleNamespace(platform=system)
        monkeypatch.setattr("lcp_plugin.config.path_lengths.sys", fake)
        assert load(HEAD + TASK, "--output_dir", LONG).options.output_dir == LONG
