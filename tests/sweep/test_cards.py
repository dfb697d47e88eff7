"""A card for each run of a sweep, and what a sweep costs before it starts."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lcp_plugin.commands.compare import main as compare
from lcp_plugin.commands.sweep import main
from lcp_plugin.errors import ConfigError
from lcp_plugin.evaluation.cards import VARIABLE, deal_cards, visible_cards
from lcp_plugin.formats.disk import write_json
from lcp_plugin.sweep import running
from lcp_plugin.sweep.plan import PlannedRun, SweepPlan
from lcp_plugin.sweep.running import execute_plan


def plan_of(folder: Path, names: str) -> SweepPlan:
    runs = [PlannedRun("naive", None, 0, folder.as_posix(), name, ()) for name in names]
    return SweepPlan((tuple(runs),))


@pytest.mark.parametrize(
    ("told", "cards"),
    [
        ("3,5", ["3", "5"]),
        ("", []),
        ("-1", []),
        ("0,-1,2", ["0"]),
        (" GPU-ab , 1", ["GPU-ab", "1"]),
    ],
)
def test_the_cards_are_those_that_the_environment_allows(
    monkeypatch: pytest.MonkeyPatch, told: str, cards: list[str]
) -> None:
    monkeypatch.setenv(VARIABLE, told)
    assert visible_cards() == cards


def test_one_card_is_nobodys_own_and_more_work_than_cards_shares_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "7")
    assert deal_cards(3) == [None, None, None]
    monkeypatch.setenv(VARIABLE, "7,9")
    assert deal_cards(3) == ["7", "9", "7"]


def test_no_two_runs_are_on_one_card_and_a_card_is_free_behind_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "3,5")
    barrier, busy, seen = threading.Barrier(2), set(), []

    def train(arguments: Any, log: Path, threads: int, card: str) -> int:
        assert card not in busy
        busy.add(card)
        seen.append(card)
        barrier.wait(timeout=60)  # passes only while two runs are here
        busy.discard(card)
        barrier.wait(timeout=60)
        return 0

    monkeypatch.setattr(running, "train", train)
    execute_plan(plan_of(tmp_path, "abcd"), parallel=2)
    assert sorted(seen) == ["3", "3", "5", "5"]
    assert os.environ[VARIABLE] == "3,5"


def test_a_runs_process_sees_its_card_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe.py").write_text(f"import os; print('card', os.environ.get('{VARIABLE}'))")
    monkeypatch.setenv(VARIABLE, "3,5")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(running, "library_server", lambda *names: None)
    monkeypatch.setattr(running, "_COMMAND", "probe")
    assert running.train([], tmp_path / "log", 1, "5") == 0
    assert (tmp_path / "log").read_text().strip() == "card 5"
    assert os.environ[VARIABLE] == "3,5"


def test_a_job_on_slurm_asks_for_a_card_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    executor = SimpleNamespace(update_parameters=asked.update)
    module = SimpleNamespace(AutoExecutor=lambda folder, cluster: executor)
    monkeypatch.setitem(sys.modules, "submitit", module)
    running.create_executor("slurm", tmp_path, ["slurm_partition=gpu"])
    assert (asked["gpus_per_node"], asked["slurm_partition"]) == (1, "gpu")
    running.create_executor("slurm", tmp_path, ["gpus_per_node=2"])
    assert asked["gpus_per_node"] == 2


def test_a_dry_run_counts_steps_images_and_hours_and_starts_nothing(
    write_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "3,5")
    config = write_config("run", max_train_steps=1800)
    flags = ["--strategies", "naive", "merge_init", "--orders", "file", "--seeds", "0"]
    flags += ["--images", "4", "--prompts", "1", "--steps", "50", "--output", str(tmp_path / "s")]
    assert main(["--config", str(config), *flags, "--dry_run", "--seconds_per_step", "2"]) == 0
    told = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in told.splitlines() if " steps " in line}
    # naive: both tasks; cells (1,1) (1,2) (2,2) and the base's two. merge_init shares the first
    assert rows["naive_seed0"][1] == "3600"
    assert rows["naive_seed0"][5] == str((3 + 2) * 4)
    assert rows["merge_init_seed0"][1] == "1800"
    assert rows["merge_init_seed0"][5] == str(2 * 4)
    assert "training 3.0 h" in told  # 5400 steps of 2 s
    assert "on 2 cards" in told
    assert not (tmp_path / "s").exists()
    assert main(["--config", str(config), *flags, "--dry_run"]) == 0
    assert "s a step of one image, on " in capsys.readouterr().out


def test_a_dry_run_counts_what_rehearsal_adds_and_no_hours_for_the_embedded_base(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config("run", max_train_steps=3600)
    flags = ["--strategies", "naive", "recall", "recall every=2", "--orders", "file"]
    flags += ["--seeds", "0", "--output", str(tmp_path / "s"), "--dry_run"]
    assert main(["--config", str(config), *flags, "--seconds_per_step", "1"]) == 0
    told = capsys.readouterr().out
    hours = {
        line.split()[0]: float(line.split()[3]) for line in told.splitlines() if " h  " in line
    }
    assert hours["naive_seed0"] == 2.0  # both tasks; the others share the first
    drawing = hours["recall_seed0"] - 2.0  # the second task's steps, and as many that rehearse
    assert 0 < drawing < 0.5
    assert hours["recall_every_2_seed0"] == pytest.approx(1.5 + drawing, abs=0.011)
    tiny = ["--pretrained_model_name_or_path", "tiny-sdxl"]
    assert main(["--config", str(config), *flags, *tiny]) == 0
    told = capsys.readouterr().out
    assert "3 runs to do: 14,400 steps" in told
    assert re.search(r"about .* on \d cores?: training .*, images ", told)
    assert "estimated at 0.5 s a step of tiny-sdxl on a core" in told
    assert "GPU" not in told


@pytest.mark.skipif(sys.platform == "win32", reason="a signal to one thread")
def test_a_comparison_says_what_it_will_do_and_stopped_begins_nothing_more(
    write_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = []

    def be_stopped(run: PlannedRun, *more: object) -> str:
        begun.append(run.name)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # as with Ctrl-C
        assert running._STOPPING.wait(60)
        return run.name

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist's workers ignore it
    monkeypatch.setattr(running, "execute_planned", be_stopped)
    output = tmp_path / "comparison"
    flags = ["--config", str(write_config("run")), "--output", str(output), "--parallel", "1"]
    try:
        assert compare(flags) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "stopped; the same command goes on.\n"
    assert "14 runs to do: " in caplog.text
    assert f"all of it in {output}; stopped, the same command goes on" in caplog.text
    assert len(begun) == 1


def test_jobs_run_through_submitits_local_executor(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    executor = running.create_executor("local", tmp_path / "jobs", ["timeout_min=10"])
    write_json(tmp_path / "a" / "run.json", {"status": "finished"})
    ((run,),) = plan_of(tmp_path, "a").waves
    job = executor.submit(running.execute_planned, run)
    assert job.result() == "a"


def test_an_unknown_job_parameter_form_is_told(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match="key=value"):
        running.create_executor("local", tmp_path, ["timeout"])
