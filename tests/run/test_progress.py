"""What people look at while a run goes on, and at its end: chain, clock, and what comes next."""

from __future__ import annotations

import io
import re
import shlex
import sys
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
from lcp_plugin.observers.course import Course
from lcp_plugin.tasks import Task

WriteConfig = Callable[..., Path]
ESCAPE = "\x1b["
GREEN = "\x1b[32m"


class Terminal(io.StringIO):
    """Text that says it is looked at."""

    def isatty(self) -> bool:
        return True


def task(index: int, name: str) -> Task:
    return Task(index, name, "object", name, ())


def report(index: int, name: str, step: int, total: int, **facts: float) -> StepReport:
    """A step of two seconds."""
    return StepReport(task(index, name), step, total, 0.5, 0.5, 1e-4, 2.0, 100.0, **facts)


def course(
    folder: Path, steps: dict[str, int | None], strategy: str = "naive", **facts: Any
) -> Course:
    facts = {"steps": steps, "strategy": {"name": strategy, "args": ["every=2"]}, **facts}
    view: Any = SimpleNamespace(
        tasks=[task(i, name) for i, name in enumerate(steps, 1)],
        facts=facts,
        strategy=SimpleNamespace(name=strategy),
        output_dir=folder,
    )
    return Course(view)


# ---------------------------------------------------------------------------------- the formula


def test_the_time_left_is_steps_times_pace_and_pauses_that_grow_with_what_is_known(
    tmp_path: Path,
) -> None:
    run = course(tmp_path, {"a": 2, "b": 4, "c": 4})
    run.move(report(1, "a", 1, 2), now=2.0)
    assert (run.done, run.total, run.share) == (1, 10, 0.1)
    assert run.time_left.seconds == 9 * 2.0  # no boundary is behind yet
    run.move(report(1, "a", 2, 2), now=4.0)
    run.move(report(2, "b", 1, 4), now=4.0 + 30.0 + 2.0)  # samples and files of one took 30 s
    assert run.done == 3
    assert run.time_left.seconds == 7 * 2.0 + 2 * 30.0


def test_the_time_left_holds_the_last_samples_and_the_scores_once_an_image_was_timed(
    tmp_path: Path,
) -> None:
    to_draw = {"samples": 6, "scores": 72}
    run = course(tmp_path, {"a": 10}, to_draw=to_draw)
    run.move(report(1, "a", 9, 10), now=2.0)
    assert (run.time_left.training, run.time_left.scoring) == (2.0, None)
    (tmp_path / "evaluation" / "images" / "robot").mkdir(parents=True)
    for number in range(2):
        (tmp_path / "evaluation" / "images" / "robot" / f"{number}.png").touch()
    run = course(tmp_path, {"a": 10}, to_draw=to_draw, drawing={"images": 3, "seconds": 12.0})
    run.move(report(1, "a", 9, 10), now=2.0)
    assert (run.time_left.training, run.time_left.scoring) == (2.0 + 6 * 4.0, 70 * 4.0)


def test_tasks_to_come_count_what_recall_will_add_until_it_rehearses(tmp_path: Path) -> None:
    run = course(tmp_path, {"a": 10, "b": 20, "c": None}, "recall")
    run.move(report(1, "a", 5, 10), now=2.0)
    assert run.time_left.training == 5 * 2 + (20 + 10) * 2 * 1.5
    run.move(report(2, "b", 20, 20, rehearsal=0.1), now=4.0)
    assert run.time_left.training == 20 * 2


def test_a_resumed_run_counts_the_tasks_that_it_has_learned(tmp_path: Path) -> None:
    run = course(tmp_path, {"a": 10, "b": 10})
    run.move(report(2, "b", 5, 10), now=1.0)
    assert run.share == 0.75
    assert run.describe(task(7, "b")) == "2 of 2 b"


def test_tasks_that_epochs_measure_are_taken_to_be_like_those_that_have_begun(
    tmp_path: Path,
) -> None:
    run = course(tmp_path, {"a": None, "b": None})
    assert run.total == 0
    run.move(report(1, "a", 3, 6), now=1.0)
    assert (run.done, run.total) == (3, 12)
    run.move(report(2, "b", 1, 10), now=2.0)
    assert (run.done, run.total) == (7, 16)


# ----------------------------------------------------------------------------------- the command


def test_a_log_file_shows_task_share_and_end_in_plain_lines(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    assert main(["--config", str(write_config("run", tasks=(0, 1)))]) == 0
    told = capsys.readouterr().err
    assert "run [merge_init]: 2 tasks on cpu: disc0, disc1\n" in told
    line = (
        r"task 1 of 2 disc0: step 3/3, 50% of the run, .* ends about \d\d:\d\d \(\d+ s left by an "
    )
    assert re.search(line, told)
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
        assert re.search(r"run \[merge_init\] 100%.* 6/6 steps, ends about \d\d:\d\d", told)


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
