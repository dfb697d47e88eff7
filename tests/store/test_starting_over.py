"""A mistake under a name: what has learned nothing starts over, what would be lost says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcp_plugin.cli import main
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.store.lock import locked

WriteConfig = Callable[..., Path]
Start = Callable[..., tuple[int, str]]


@pytest.fixture
def start(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> Start:
    """start(*flags, **options): exit status and what was said of a run named `run`."""

    def run(*flags: str, **options: Any) -> tuple[int, str]:
        config = write_config("run", **{"tasks": (0,), **options})
        capsys.readouterr()
        status = main(["--config", str(config), *flags])
        told = capsys.readouterr().err
        assert "Traceback" not in told
        return status, told

    return run


@pytest.fixture
def hash_of(tmp_path: Path) -> Callable[[str], str]:
    """hash_of(name): the tensors of a deliverable, as kohya hashes them."""
    return lambda name: file_model_hash(tmp_path / "out" / f"{name}.safetensors")


@pytest.mark.parametrize(
    "mistake",
    [
        {"optimizer_args": ["decouple=True"]},
        {"learning_rate": 1e30},
        {"network_args": ["conv_dim=4", "conv_alpha=1"], "learning_rate": 1e30},
    ],
)
def test_a_run_that_has_learned_nothing_starts_over(
    start: Start,
    write_config: WriteConfig,
    hash_of: Callable[[str], str],
    mistake: dict[str, Any],
) -> None:
    given = {"resume_every_n_steps": 100}
    status, told = start(**given, **mistake)
    assert status != 0
    assert "error: " in told
    assert start(**given)[0] == 0
    assert main(["--config", str(write_config("right", tasks=(0,), **given))]) == 0
    assert hash_of("run") == hash_of("right")


def test_the_advice_of_a_nan_can_be_followed(start: Start) -> None:
    status, told = start(learning_rate=1e30, resume_every_n_steps=100)
    assert status == 1
    assert "nothing was learned so far" in told
    assert "lower learning_rate" in told
    assert start(learning_rate=1e-3, resume_every_n_steps=100)[0] == 0


@pytest.mark.parametrize("kept", ["a state", "a task", "an interim file"])
def test_what_would_be_lost_is_refused_and_overwrite_starts_over(
    start: Start,
    write_config: WriteConfig,
    hash_of: Callable[[str], str],
    kept: str,
    tmp_path: Path,
) -> None:
    wrong: dict[str, Any] = {"learning_rate": 1e30, "resume_every_n_steps": 100}
    if kept == "a state":
        wrong["resume_every_n_steps"] = 1
    elif kept == "an interim file":
        wrong["save_every_n_steps"] = 1
    else:
        assert start(**{**wrong, "learning_rate": 1e-2})[0] == 0
        wrong |= {"learning_rate": 1e-2, "tasks": (0, 1)}
        (tmp_path / "data" / "disc1" / "00.png").write_bytes(b"broken")
    assert start(**wrong)[0] == 1
    right = {"tasks": (0,), "learning_rate": 1e-3}
    before = sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file())
    status, told = start(**right)
    assert status == 1
    assert "learning_rate" in told
    assert "--overwrite" in told
    assert sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file()) == before
    assert start("--overwrite", **right)[0] == 0
    assert main(["--config", str(write_config("right", **right))]) == 0
    assert hash_of("run") == hash_of("right")


def test_a_run_that_is_at_work_is_not_cleared_away(
    start: Start, tmp_path: Path, write_config: WriteConfig
) -> None:
    import os

    assert start(learning_rate=1e30, resume_every_n_steps=100)[0] == 1
    root, ready, done = tmp_path / "out" / "run", os.pipe(), os.pipe()
    other = os.fork()
    if other == 0:
        with locked(root, "run"):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    status, told = start(learning_rate=1e-3)
    assert status == 1
    assert "another process" in told
    assert (root / "run.json").is_file()
    os.write(done[1], b"x")
    os.waitpid(other, 0)
    assert start(learning_rate=1e-3)[0] == 0


def test_changed_images_beside_a_state_name_the_way_out_and_lose_nothing(
    start: Start,
    write_config: WriteConfig,
    hash_of: Callable[[str], str],
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {"tasks": (0, 1), "resume_every_n_steps": 1, "max_train_steps": 3}
    boom = _stop_in_task(2)
    assert start(**given)[0] == 1
    boom.undo()
    picture, other = (tmp_path / "data" / name / "00.png" for name in ("disc1", "disc0"))
    picture.write_bytes(other.read_bytes())
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.safetensors")}
    status, told = start(**given)
    assert status == 1
    assert "images or captions of task disc1 have changed" in told
    assert "start this task again with --overwrite" in told
    assert "the tasks before it stay" in told
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.safetensors")}
    first = hash_of("run/01_disc0/adapter")
    status, told = start("--overwrite", **given)
    assert status == 0, told
    assert "task disc1 starts again" in told
    assert hash_of("run/01_disc0/adapter") == first
    assert main(["--config", str(write_config("right", **given))]) == 0
    assert hash_of("run") == hash_of("right")


def _stop_in_task(index: int) -> pytest.MonkeyPatch:
    """Makes the disk full behind the second step of a task."""
    from lcp_plugin.errors import DiskError
    from lcp_plugin.observers.jsonl import JsonLines

    whole = JsonLines.on_step_end

    def stop(self: JsonLines, run: Any, step: Any) -> None:
        whole(self, run, step)
        if step.task.index == index and step.index >= 2:
            raise DiskError("no space")

    patch = pytest.MonkeyPatch()
    patch.setattr(JsonLines, "on_step_end", stop)
    return patch
