"""Runs that were killed or stopped end as if they had not been."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import LAW_2, run_and_kill
from toy_runs import (
    STRATEGIES,
    assert_equal_tensors,
    draw_two,
    read_all,
    read_samples,
    under,
    write_run,
)

from lcp_plugin.cli import main
from lcp_plugin.errors import DiskError, LineageError
from lcp_plugin.store.run_folder import RunStore

Train = Callable[..., Any]


PLACES = ("config", "data_root", "output_dir")


@dataclass(frozen=True)
class Left:
    """What a run left on disk."""

    tensors: dict[str, torch.Tensor]
    lineages: list[dict[str, Any]]
    samples: dict[str, bytes]

    @classmethod
    def by(cls, store: RunStore) -> Left:
        """What is to be the same however often the run was killed."""
        return cls(read_all(store), read_lineages(store), read_samples(store))

    def assert_equals(self, other: Left) -> None:
        """Tensors bit for bit, lineages but for their sessions, images pixel by pixel."""
        assert_equal_tensors(self.tensors, other.tensors)
        assert self.lineages == other.lineages
        assert self.samples.keys() == other.samples.keys()
        assert [n for n, pixels in self.samples.items() if other.samples[n] != pixels] == []


def read_lineages(store: RunStore) -> list[dict[str, Any]]:
    """lineage.json of every task without what may differ: times, session ids and places."""
    told = [{k: v for k, v in f.lineage.items() if k != "session"} for f in store.folders()]
    for facts in told:
        facts["options"] = {k: v for k, v in facts["options"].items() if k not in PLACES}
    return told


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_killed_five_times_ends_as_if_it_had_not_been(
    write_config: Callable[..., Path], tmp_path: Path, strategy: str
) -> None:
    options = {**LAW_2, **under(strategy)}
    if strategy != "merge_init":  # how images are read is no strategy's business
        options["max_data_loader_n_workers"] = 0
    out = tmp_path / "out"
    status, events = run_and_kill(write_config("run", **options), None)
    assert status == 0
    whole = Left.by(RunStore(out, "run"))
    assert len(whole.samples) == 1 + 2 + 1 + 2  # the grid, the base, and what each stage knows
    shutil.move(out, tmp_path / "whole")
    config = write_config("run", **options)
    points = random.Random(strategy)
    for _ in range(5):
        status, _ = run_and_kill(config, points.randint(1, max(2, events // 3)))
        assert status == -signal.SIGKILL
    status, _ = run_and_kill(config, None)
    assert status == 0
    whole.assert_equals(Left.by(RunStore(out, "run")))


@pytest.fixture(scope="module")
def undisturbed(toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Left]:
    """The events of a run that nothing kills, and what it leaves."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_run(folder, toy_base, draw_two(folder / "data"), "run", **LAW_2)
    status, events = run_and_kill(config, None)
    assert status == 0
    return events, Left.by(RunStore(folder / "out", "run"))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.97])
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(
    write_config: Callable[..., Path],
    tmp_path: Path,
    undisturbed: tuple[int, Left],
    share: float,
) -> None:
    config = write_config("run", **LAW_2)
    events, whole = undisturbed
    assert run_and_kill(config, max(1, int(share * events)))[0] == -signal.SIGKILL
    assert run_and_kill(config, None)[0] == 0
    whole.assert_equals(Left.by(RunStore(tmp_path / "out", "run")))


def test_sigterm_saves_first_and_the_same_command_goes_on(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcp_plugin.observers import JsonLines

    options = {"max_train_steps": 4, "resume_every_n_steps": 0}
    assert main(["--config", str(write_config("whole", **options))]) == 0
    config, stopped = write_config("run", **options), []
    log = JsonLines.on_step_end

    def stop_once(self: Any, run: Any, step: Any) -> None:
        log(self, run, step)
        if not stopped and step.index == 3:
            stopped.append(step.index)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(JsonLines, "on_step_end", stop_once)
    assert main(["--config", str(config)]) == 130
    store = RunStore(tmp_path / "out", "run")
    assert store.folders() == []
    assert [p.name for p in (store.root / "state").iterdir()] == ["01_disc0_step00000003"]
    assert main(["--config", str(config)]) == 0
    assert stopped == [3]
    assert_equal_tensors(read_all(RunStore(tmp_path / "out", "whole")), read_all(store))


def test_two_processes_may_not_train_one_run(
    train: Train, write_config: Callable[..., Path]
) -> None:
    from lcp_plugin.store.lock import locked

    config = write_config("run")
    root = RunStore(config.parent / "out", "run").root
    ready, done = os.pipe(), os.pipe()
    other = os.fork()
    if other == 0:
        with locked(root, "run"):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(DiskError, match="another process"):
        train("run")
    os.write(done[1], b"x")
    os.waitpid(other, 0)
    train("run")


def test_a_worker_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path: Path) -> None:
    from lcp_plugin.store.lock import locked

    ready, done = os.pipe(), os.pipe()
    run = os.fork()
    if run == 0:
        with locked(tmp_path, "run"):
            if os.fork() == 0:  # as a data loader's worker
                os.write(ready[1], b"x")
                os.read(done[0], 1)
                os._exit(0)
            os.read(done[0], 1)
    os.read(ready[0], 1)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    with locked(tmp_path, "run"):
        os.write(done[1], b"x")  # the worker is still there
    assert (tmp_path / ".lock").exists()


def test_a_state_that_replaying_cannot_give_is_kept(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    run = train("run", tasks=(0, 1), strategy="proof_strategies:OnlineEwc")
    first = run.store.folders()[0]
    assert not first.carry_file.exists()
    state = run.store.parent_at(1).state
    assert any(key.startswith("fisher/") for key in state)
    (first.path / "strategy.safetensors").unlink()
    with pytest.raises(LineageError, match="--keep_carries all"):
        run.store.parent_at(1)
