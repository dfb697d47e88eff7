"""The page of `lcp watch`: of a run that goes on, that is finished, and that has died."""

import html
import json
import os
import re
import shutil

import pytest
from report_samples import EVIL, Outline, add_recognition, make_run
from watched_runs import (
    COMMAND,
    edit_run,
    held,
    line,
    make_unfinished,
    served,
    steps,
    write_log,
)

STATE = re.compile(r'<p class="life (\w+)"')


def lead_of(pieces):
    """What the page says first, as text."""
    return html.unescape(re.search(r'<p class="lead">(.*?)</p>', pieces["head"])[1])


def numbers_of(pieces):
    """The figures under it."""
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)<small>(.*?)</small>", pieces["head"])
    return {label: (value, note) for label, value, note in found}


def test_a_run_that_goes_on_is_followed_step_by_step_and_its_grid_grows(tmp_path):
    folder = make_unfinished(tmp_path / "mine")
    with held(folder), served(folder) as page:
        write_log(folder, steps(2, 38, 38), '{"event": "step", "ta', mode="a")
        first = page.live()
        assert STATE.findall(first["head"]) == ["running"]
        assert lead_of(first).startswith("Learning task 2 of 3, zwz <script>")
        assert lead_of(first).endswith("step 38 of 60.")
        numbers = numbers_of(first)
        assert numbers["task"] == ("2 of 3", "evil")
        assert numbers["step"] == ("38", "of 60 in this task")
        assert numbers["loss"][0] == "0.2500"
        assert numbers["rehearsal loss"][0] == "0.0500"
        assert numbers["memory"] == ("7.9 GB", "peak, in this task")
        # 22 steps of 2 s, then a task of 60 and twice the pause of 16 s behind the first
        assert numbers["time left"][0] == "3 min"
        assert numbers["time left"][1].startswith("an estimate, until about ")
        assert numbers["time left"][1].endswith("at 2.00 s a step")
        assert "Loss of each task" in first["training"]
        assert "Rehearsal loss of each task" in first["training"]
        assert first["recognised"] == ""
        assert first["samples"].count("<img") == 3 + 1
        assert "after 2" not in first["samples"]
        write_log(folder, [*steps(2, 39, 60), line("task_end", 2)], "k\n", mode="a")
        shutil.copytree(folder / "samples" / "01_robot", folder / "samples" / "02_evil")
        then = page.live()
        assert lead_of(then) == "Task 3 of 3 is being prepared."
        assert then["samples"].count("<img") == 3 + 1 + 1
        assert "after 2" in then["samples"]
        assert then["goes_on"] is True


TO_DRAW = {"samples": 6, "scores": 72}  # scores: 3 + 6 cells of 2 prompts x 4 images


@pytest.mark.parametrize(
    ("drawing", "left", "note"),
    [
        # 28 s, then 60 steps and twice the pause of 16 s: 180 s; 2 samples of 3 concepts at 4 s;
        # 72 images for the scores, of which two are there
        ({"images": 6, "seconds": 24.0}, "8 min", "s a step; 5 min of it for the scores"),
        (None, "3 min", "s a step; the scores at its end come on top"),
    ],
)
def test_the_time_left_holds_samples_and_scores_as_far_as_an_image_was_timed(
    tmp_path, drawing, left, note
):
    folder = make_unfinished(tmp_path / "mine")
    edit_run(folder, to_draw=TO_DRAW, drawing=drawing)
    images = folder / "evaluation" / "images" / "base-0" / "robot"
    images.mkdir(parents=True)
    for number in range(2):
        (images / f"p00_{number:02d}.png").touch()
    with held(folder), served(folder) as page:
        write_log(folder, steps(2, 38, 46), mode="a")
        found = numbers_of(page.live())["time left"]
    assert found[0] == left
    assert found[1].endswith(note)


def test_a_run_that_is_scored_tells_when_its_images_will_be_drawn(tmp_path):
    folder = make_run(tmp_path / "mine")
    edit_run(folder, to_draw=TO_DRAW, drawing={"images": 1, "seconds": 1.0})
    with held(folder), served(folder) as page:
        found = numbers_of(page.live())["time left"]
    assert found[0] == "72 s"
    assert found[1].endswith(", to draw what is scored")


def test_a_finished_run_shows_its_grid_its_curves_and_what_is_still_recognised(tmp_path):
    folder = add_recognition(make_run(tmp_path / "mine"))
    with served(folder) as page:
        pieces = page.live()
        assert STATE.findall(pieces["head"]) == ["finished"]
        assert pieces["goes_on"] is False
        assert lead_of(pieces).startswith("All 3 tasks are learned. One of three concepts is still")
        assert numbers_of(pieces)["still recognised"][0] == "1 of 3"
        assert "✕ teapot" in pieces["recognised"]
        assert "like olb teapot" in pieces["samples"]
        assert "time left" not in pieces["head"]
        assert "Options (3)" in pieces["details"]


@pytest.mark.parametrize(
    ("last", "state", "says"),
    [
        ([], "died", "It has died without a word"),
        ([line("error", error="Interrupted", message="saved")], "stopped", "It was stopped"),
        ([line("error", error="NumericError", message="the loss is <nan>")], "failed", "an error"),
    ],
)
def test_a_run_that_was_broken_off_says_how_and_gives_its_command(tmp_path, last, state, says):
    folder = make_unfinished(tmp_path / "mine", *last)
    saved = folder / "state" / "02_evil_step00000030"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text("{}")
    with served(folder) as page:
        pieces = page.live()
    assert STATE.findall(pieces["head"]) == [state]
    assert says in lead_of(pieces)
    assert "step 37 of 60" in lead_of(pieces)
    shown = re.search(r"<pre.*?<code>(.*?)</code>", pieces["head"], re.DOTALL)[1]
    command = html.unescape(re.sub("<[^>]*>", "", shown))
    assert command == f"cd {COMMAND['folder']}\n{COMMAND['line']}"
    assert "from step 30 of task 2 of 3, evil" in pieces["head"]
    assert pieces["head"].count("NumericError: the loss is &lt;nan&gt;") == (state == "failed")
    assert not Outline(pieces["head"]).open


def test_a_run_that_recorded_no_command_says_so(tmp_path):
    folder = make_unfinished(tmp_path / "mine")
    edit_run(folder, command=None)
    with served(folder) as page:
        assert "run.json does not tell" in page.live()["head"]


def test_a_run_that_only_begins_is_waited_for(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    with held(folder), served(folder) as page:
        pieces = page.live()
        assert STATE.findall(pieces["head"]) == ["starting"]
        assert pieces["samples"] == pieces["training"] == pieces["tasks"] == ""
        assert page.ask("").status == 200


@pytest.mark.parametrize("locked", [".", "evaluation"])
def test_a_run_that_is_scored_now_is_not_called_finished(tmp_path, locked):
    folder = make_run(tmp_path / "mine")
    with held(folder / locked), served(folder) as page:
        assert STATE.findall(page.live()["head"]) == ["closing"]


def test_files_that_are_replaced_or_broken_while_they_are_read_are_no_error(tmp_path):
    folder = make_unfinished(tmp_path / "mine")
    with held(folder), served(folder) as page:
        page.live()
        write_log(folder, steps(1, 1, 3))  # started over
        assert "step 3 of 60" in lead_of(page.live())
        (folder / "logs" / "steps.jsonl").unlink()
        (folder / "samples" / "00_base" / "robot_0.png").write_bytes(b"half")
        assert page.live()["samples"].count("<img") == 3
        (folder / "run.json").write_text('{"name": "mi')
        assert page.live()["samples"].count("<img") == 1  # of the task whose lineage tells of it
        shutil.rmtree(folder / "samples")
        assert page.live()["samples"] == ""


def test_the_page_writes_nothing_and_takes_no_lock(tmp_path):
    folder = make_unfinished(tmp_path / "mine")
    (folder / ".lock").touch()
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}
    with served(folder) as page:
        page.ask("")
        with held(folder):  # which would fail if the page held it
            pass
        os.utime(folder / ".lock", ns=(before[folder / ".lock"][0],) * 2)
        page.live()
    after = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}
    assert after == before


def test_the_page_is_whole_without_a_script_and_asks_no_other_place(tmp_path):
    folder = make_unfinished(tmp_path / "mine")
    with served(folder) as page:
        text = page.ask("").text
        assert json.loads(page.ask("live").data)["title"] == "Died · mine"
    assert EVIL not in text
    assert text.count("<script>") == 2
    outline = Outline(text)
    assert not outline.open
    assert len(outline.ids) == len(set(outline.ids))
    asked = re.findall(r'(?:src|href|action)="([^"]*)"', text)
    assert asked
    assert all(re.match(r"(small/|whole/|#|data:,$)", place) for place in asked)
    for place in sorted(set(re.findall(r'src="(small/[^"]*)"', text))):
        with served(folder) as again:
            again.live()
            assert again.ask(place).headers["Content-Type"] == "image/png"
