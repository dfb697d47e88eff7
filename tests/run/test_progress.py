"""What people look at while a run goes on, and at its end: chain, clock, and what comes next."""

from __future__ import annotations

import io
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_runs import draw_pictures

from lcp_plugin.cli import main
from lcp_plugin.commands.init import main as init
from lcp_plugin.hooks import StepReport
from lcp_plugin.observers import console
from lcp_plugin.observers.course import Course, describe_duration, describe_end
from lcp_plugin.tasks import Task

WriteConfig = Callable[..., Path]
ESCAPE = "\x1b["
GREEN = "\x1b[32m"


class Terminal(io.StringIO):
    """Text that says it is looked at."""

    def isatty(self) -> bool:
        return True


def report(name: str, index: int, total: int, seconds: float = 2.0) -> StepReport:
    task = Task(1, name, "object", name, ())
    return StepReport(task, index, total, 0.5, 0.5, 1e-4, seconds, 100.0)


def course(steps: dict[str, int | None]) -> Course:
    tasks = [SimpleNamespace(name=name) for name in steps]
    view: Any = SimpleNamespace(tasks=tasks, facts={"steps": steps})
    return Course.of(view)


# ---------------------------------------------------------------------------------- the formula


def test_the_time_left_is_steps_times_pace_and_boundaries_times_their_pause() -> None:
    run = course({"a": 2, "b": 4, "c": 4})
    run.move(report("a", 1, 2), now=2.0)
    assert (run.done, run.total, run.share) == (1, 10, 0.1)
    assert run.seconds_left == 9 * 2.0  # no boundary is behind yet
    run.move(report("a", 2, 2), now=4.0)
    run.move(report("b", 1, 4), now=4.0 + 30.0 + 2.0)  # samples and files took 30 s
    assert run.done == 3
    assert run.seconds_left == 7 * 2.0 + 1 * 30.0


def test_a_resumed_run_counts_the_tasks_that_it_has_learned() -> None:
    run = course({"a": 10, "b": 10})
    run.move(report("b", 5, 10), now=1.0)
    assert run.share == 0.75
    assert run.describe(Task(7, "b", "object", "b", ())) == "2 of 2 b"


def test_tasks_that_epochs_measure_are_taken_to_be_like_those_that_have_begun() -> None:
    run = course({"a": None, "b": None})
    assert run.total == 0
    run.move(report("a", 3, 6), now=1.0)
    assert (run.done, run.total) == (3, 12)
    run.move(report("b", 1, 10), now=2.0)
    assert (run.done, run.total) == (7, 16)


def test_the_end_is_a_clock_with_its_day_where_that_is_another() -> None:
    noon = time.mktime((2026, 11, 27, 12, 0, 0, 0, 0, -1))
    assert describe_end(9120, noon) == "14:32"
    assert describe_end(86400, noon) == time.strftime("%a 12:00", time.localtime(noon + 86400))
    assert describe_end(10 * 86400, noon) == "2026-12-07"
    assert [describe_duration(s) for s in (90, 720, 9000)] == ["90 s", "12 min", "2.5 h"]


# ----------------------------------------------------------------------------------- the command


def test_a_log_file_shows_task_share_and_end_in_plain_lines(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    assert main(["--config", str(write_config("run", tasks=(0, 1)))]) == 0
    told = capsys.readouterr().err
    assert re.search(r"task 1 of 2 disc0: step 3/3, 50% of the run, .* ends \d\d:\d\d \(", told)
    assert re.search(r"task 2 of 2 disc1: step 3/3, 100% of the run, ", told)
    assert "\r" not in told
    assert ESCAPE not in told


@pytest.mark.parametrize(
    ("settings", "bars", "colour"),
    [({}, True, True), ({"NO_COLOR": "1"}, True, False), ({"TERM": "dumb"}, False, False)],
    ids=["terminal", "NO_COLOR", "dumb"],
)
def test_a_terminal_gets_bars_and_colours_only_where_they_are_wanted(
    write_config: WriteConfig,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    bars: bool,
    colour: bool,
) -> None:
    for name, value in {"TERM": "xterm", "NO_COLOR": "", **settings}.items():
        monkeypatch.setenv(name, value)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert main(["--config", str(write_config("run", tasks=(0, 1)))]) == 0
    told = screen.getvalue()
    assert ("\r" in told) is bars
    assert (GREEN in told) is colour
    if bars:
        assert re.search(r"run \[merge_init\] 100%.* 6/6 steps, ends \d\d:\d\d", told)


def test_a_run_ends_with_three_commands_on_what_it_has_made(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(write_config("my run", tasks=(0,)))]) == 0
    told = capsys.readouterr().out
    lines = told[told.index("what next") :].splitlines()
    words = {
        line[2:19].strip(): shlex.split(line[19:].strip()) for line in lines[1:4]
    }  # what it is for -> the command
    root = tmp_path / "out" / "my run"
    assert words["look at it"] == ["lcp", "evaluate", str(root)]
    assert words["learn more"][:2] == ["lcp", "init"]
    assert words["learn more"][-2:] == ["--prev", str(root / "01_disc0")]
    assert words["take it along"][:3] == ["lcp", "export", f"{root}.safetensors"]
    assert Path(words["take it along"][2]).is_file()
    draw_pictures(tmp_path / "photos" / "dog")
    more = tmp_path / "more.toml"
    assert init([str(tmp_path / "photos"), *words["learn more"][3:], "--output", str(more)]) == 0
    quick = ["--max_train_steps", "1", "--optimizer_type", "AdamW", "--mixed_precision", "no"]
    assert main(["--config", str(more), "--output_dir", str(tmp_path / "out"), *quick]) == 0
    assert "learned      disc0, dog  (merge_init, seed 0)" in capsys.readouterr().out
