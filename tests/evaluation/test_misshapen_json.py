"""JSON of another shape than it was written in, by every command that reads it: one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from lora_samples import Q, factors
from quick_scores import score
from toy_runs import write_run

from lcp_plugin.adapter import Adapter
from lcp_plugin.commands.front import main
from lcp_plugin.formats.lora_file import write_lora
from lcp_plugin.report.read import read_run

JUNK = (5, "x", [], {"a": 1}, None, True, [5], -1.5)


@pytest.fixture
def scored(run: Path, tmp_path: Path, pictures: Path, quick_encoder: None) -> Path:
    """A run with scores.json in its folder."""
    score([run], run / "evaluation", pictures)
    return run


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """ask(*argv): the one error line of a command that fails; empty where it succeeds."""

    def run_command(*argv: object) -> str:
        capsys.readouterr()
        status = main(list(map(str, argv)))
        told = capsys.readouterr().err
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        assert len(errors) == bool(status), told
        return errors[0] if errors else ""

    return run_command


def write_scores(path: Path, kind: str, scored: Path) -> Path:
    """A file or folder that is no scores.json."""
    good = json.loads((scored / "evaluation" / "scores.json").read_text("utf-8"))
    short, texts = copy.deepcopy(good), copy.deepcopy(good)
    del short["runs"][0]["metrics"]["effnet"]["matrix"][0]
    texts["runs"][0]["recognition"]["looks"][0][0] = "robot"
    values = {
        "list": [1],
        "null": None,
        "no runs": {"scores": {"effnet": 0.4}},
        "a run that is text": {"runs": ["mine"]},
        "no metrics": {"runs": [{"name": "mine"}]},
        "a short matrix": short,
        "a look that is text": texts,
    }
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("scores", encoding="utf-8")
    elif kind == "bytes":
        path.write_bytes(b"\xff\xfe{")
    elif kind != "missing":
        path.write_text(json.dumps(values[kind]), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "cannot be read (No such file"),
        ("folder", "cannot be read (Is a directory"),
        ("text", "is not valid JSON"),
        ("bytes", "is not valid JSON"),
        ("list", "all of it is a list of 1, wanted a table"),
        ("null", "all of it is null"),
        ("no runs", "it has no runs"),
        ("a run that is text", "runs[0] is 'mine', wanted a table"),
        ("no metrics", "it has no runs[0].metrics"),
        ("a short matrix", "mine's effnet is not of 2 tasks"),
        ("a look that is text", "'robot', wanted a table"),
    ],
)
def test_a_report_says_what_is_no_scores_file(
    scored: Path, tmp_path: Path, ask: Callable[..., str], kind: str, words: str
) -> None:
    file = write_scores(tmp_path / "s.json", kind, scored)
    told = ask("report", scored, "--scores", file, "--output", tmp_path / "r.html")
    assert words in told
    assert "s.json" in told
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("kind", ["text", "list", "no runs", "a look that is text"])
def test_a_page_without_readable_scores_is_made_and_says_so(
    scored: Path,
    tmp_path: Path,
    ask: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    write_scores(scored / "evaluation" / "x.json", kind, scored).replace(
        scored / "evaluation" / "scores.json"
    )
    assert ask("report", scored, "--output", tmp_path / "r.html") == ""
    assert "The page leaves the scores out" in caplog.text
    assert (tmp_path / "r.html").is_file()


@pytest.mark.parametrize(
    ("output", "words"), [("", "folder"), ("no/such/r.html", ""), ("data/disc0/00.png/r.html", "")]
)
def test_a_report_cannot_take_the_place_of_a_folder_or_go_into_a_file(
    run: Path, tmp_path: Path, pictures: Path, ask: Callable[..., str], output: str, words: str
) -> None:
    told = ask("report", run, "--output", tmp_path / output)
    assert words in told
    assert bool(told) is (output != "no/such/r.html")
    assert (pictures / "disc0" / "00.png").is_file()


MEASURED = {
    "bleed": {"matrix": [[0.9, 0.2], [0.3, 0.8]], "base": [[0.4, 0.4], [0.4, 0.4]]},
    "leakage": {"per_task": {}, "mean": None},
    "drift": {"after": [0.1, 0.2]},
    "diversity": {"final": {"disc0": 0.2}, "base": {"disc0": None}},
    "multi": {"pairs": [], "mean": 0.3},
    "recognition": {"mean": {"learned": 1, "final": 0.5, "base": 0, "covered": None}},
    "losses": {
        "normalised": [[None, 0.2], [0.1, None]],
        "self_drift": [[0.0, 0.2], [0.1, 0.0]],
        "rank_correlation": {"loss_gain": None, "self_drift": 0.5},
    },
    "of a later version": {"x": 1},
}


@pytest.mark.parametrize(
    ("place", "new", "words"),
    [
        (("bleed", "matrix"), [], "bleed.matrix is no table of rows of one length"),
        (("bleed", "matrix", 0), [], "bleed.matrix is no table of rows of one length"),
        (("bleed", "base", 1), [0.4], "bleed.base is no table of rows of one length"),
        (("bleed", "matrix", 0, 1), "x", "bleed.matrix[0][1] is 'x', wanted a number"),
        (("leakage", "mean"), "much", "leakage.mean is 'much', wanted a number or nothing"),
        (("drift", "after"), None, "it has no extras.runs.mine.drift.after"),
        (("drift", "after", 0), True, "drift.after[0] is True, wanted a number"),
        (("diversity", "final"), [1], "diversity.final is a list of 1, wanted a table"),
        (("diversity", "base", "disc0"), [], "diversity.base.disc0 is a list of 0"),
        (("multi",), 5, "extras.runs.mine.multi is 5, wanted a table"),
        (("recognition", "mean", "covered"), "x", "mean.covered is 'x', wanted a number"),
        (("recognition", "mean", "final"), None, "it has no extras.runs.mine.recognition.mean"),
        (("losses", "normalised", 1), [], "losses.normalised is no table of rows"),
        (("losses", "rank_correlation"), 0.5, "losses.rank_correlation is 0.5, wanted a table"),
    ],
)
def test_extras_of_another_shape_are_told_in_one_line_and_stay(
    run: Path, tmp_path: Path, ask: Callable[..., str], place: tuple[Any, ...], new: Any, words: str
) -> None:
    file, page = tmp_path / "s.json", tmp_path / "r.html"
    page.write_text("old", encoding="utf-8")
    about = dict.fromkeys(MEASURED, "a sentence")
    good = {"runs": [], "extras": {"about": about, "runs": {run.name: MEASURED}}}
    whole = ("extras", "runs", run.name, *place)
    file.write_text(json.dumps(with_changed(good, whole, new)), encoding="utf-8")
    before = file.read_bytes()
    told = ask("report", run, "--scores", file, "--output", page)
    assert words in told
    assert "s.json is not as it was written" in told
    assert "wanted scores.json of lcp evaluate." in told
    assert (file.read_bytes(), page.read_text(encoding="utf-8")) == (before, "old")


def test_extras_as_they_are_written_come_into_the_page_and_unknown_ones_stay_out(
    scored: Path, tmp_path: Path, ask: Callable[..., str]
) -> None:
    good = json.loads((scored / "evaluation" / "scores.json").read_text("utf-8"))
    good["extras"] = {"about": dict.fromkeys(MEASURED, "so"), "runs": {scored.name: MEASURED}}
    (tmp_path / "s.json").write_text(json.dumps(good), encoding="utf-8")
    page = tmp_path / "r.html"
    assert ask("report", scored, "--scores", tmp_path / "s.json", "--output", page) == ""
    text = page.read_text("utf-8")
    assert "Class-word leakage" in text
    assert "of a later version" not in text


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All places of a JSON value, of lists the first entry; options and their like not in depth."""
    yield path
    if len(path) > 3 or (path and path[0] in ("fingerprint", "options", "versions", "data")):
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_in(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from paths_in(value[0], (*path, 0))


def with_changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The value with another one at a place; None there: nothing."""
    if not path:
        return new
    changed = copy.deepcopy(value)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    if new is None and isinstance(at, dict):
        del at[path[-1]]
    return changed


@pytest.mark.parametrize(
    "name", ["run.json", "01_disc0/lineage.json", "02_disc1/lineage.json", "evaluation/scores.json"]
)
def test_whatever_stands_in_a_file_of_a_run_no_command_breaks(
    scored: Path, toy_base: Path, pictures: Path, tmp_path: Path, ask: Callable[..., str], name: str
) -> None:
    file = scored / name
    data = json.loads(file.read_text("utf-8"))
    write_run(tmp_path, toy_base, pictures, "next", (2,))
    page = ("report", scored, "--output", tmp_path / "r.html")
    reading = [page, page] if name.endswith("scores.json") else [
        page,
        ("lineage", scored),
        ("lineage", scored, "--toml"),
        ("doctor", "--report", scored),
        ("train", "--config", tmp_path / "next.toml", "--prev", scored, "--dry_run"),
        ("evaluate", scored, "--images", "2", "--steps", "2", "--prompts", "1"),
    ]  # fmt: skip
    for place, junk, argv in zip(paths_in(data), cycle(JUNK), cycle(reading), strict=False):
        file.write_text(json.dumps(with_changed(data, place, junk)), encoding="utf-8")
        told = ask(*argv)
        assert len(told) < 600, told


def test_a_file_of_another_shape_says_where_and_what_was_wanted(
    run: Path, ask: Callable[..., str]
) -> None:
    file = run / "02_disc1" / "lineage.json"
    data = json.loads(file.read_text("utf-8"))
    for path, new, words in (
        (("strategy", "name"), 5, "strategy.name is 5, wanted text or nothing"),
        (("tasks", 0, "index"), "one", "tasks[0].index is 'one', wanted a whole number"),
        (("hashes", "carry"), None, "it has no hashes.carry"),
    ):
        file.write_text(json.dumps(with_changed(data, path, new)), encoding="utf-8")
        told = ask("lineage", run)
        assert f"lineage.json is not as it was written: {words}" in told
        assert "restore it from a copy" in told
    file.write_text(json.dumps(data), encoding="utf-8")
    assert ask("lineage", run) == ""
    assert len(read_run(run).tasks) == 2


@pytest.mark.parametrize(
    "header",
    [
        {"ss_datasets": '[{"subsets": [5]}]'},
        {"ss_datasets": '[{"subsets": {}}, 5]', "ss_tag_frequency": '{"a": {}, "b": {}}'},
        {"ss_dataset_dirs": '{"1_a": 5, "1_b": 5}', "ss_steps": "x", "ss_network_dim": "[]"},
        {"ss_dataset_dirs": "[1]", "ss_network_args": "[", "ss_datasets": "null"},
    ],
)
def test_a_header_of_another_shape_still_gives_toml(
    tmp_path: Path, ask: Callable[..., str], header: dict[str, str]
) -> None:
    given = {"ss_learning_rate": "0.0001", "ss_output_name": "x", **header}
    write_lora(tmp_path / "x.safetensors", Adapter({Q: factors((8, 6), 2, 2.0, 0)}), given)
    assert ask("lineage", tmp_path / "x.safetensors", "--toml") == ""


def test_a_number_that_is_none_is_refused_as_the_option_it_is(
    run: Path, tmp_path: Path, ask: Callable[..., str]
) -> None:
    lora = run.parent / "a.safetensors"
    write_lora(lora, Adapter({Q: factors((8, 6), 2, 2.0, 0)}))
    told = ask("merge", lora, "-o", tmp_path / "m.safetensors", "--weights", "nan")
    assert "--weights: got 'nan'; wanted a finite number" in told
    assert "--guidance: got 'inf'" in ask("evaluate", run, "--guidance", "inf")


@pytest.mark.parametrize("number", ["99999999999999999999", "9" * 5000, "-1", "1e3"])
def test_a_seed_that_torch_does_not_take_is_refused_as_the_option_it_is(
    tmp_path: Path, ask: Callable[..., str], number: str
) -> None:
    for command in ("evaluate --latent_seed", "rehearse x --seed", "merge x -o y --seed"):
        verb, *rest = command.split()
        assert "wanted a whole number, 0 to 2^63 - 1" in ask(verb, *rest, number)


@pytest.mark.parametrize("option", ["--seed", "--sample_seed"])
def test_training_refuses_a_seed_that_torch_does_not_take(
    tmp_path: Path, toy_base: Path, pictures: Path, ask: Callable[..., str], option: str
) -> None:
    config = write_run(tmp_path, toy_base, pictures, "run", (0,))
    told = ask("train", "--config", config, option, "99999999999999999999", "--dry_run")
    assert f"{option[2:]} = " in told


def test_a_trackers_table_of_another_shape_is_told_by_a_dry_run(
    tmp_path: Path, toy_base: Path, pictures: Path, ask: Callable[..., str]
) -> None:
    (tmp_path / "t.toml").write_text('wandb = "x"\n', encoding="utf-8")
    config = write_run(tmp_path, toy_base, pictures, "run", (0,))
    given = ("--log_with", "wandb", "--log_tracker_config", tmp_path / "t.toml")
    assert "wanted a table for each tracker" in ask(
        "train", "--config", config, *given, "--dry_run"
    )
