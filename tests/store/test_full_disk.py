"""A disk that is full while a run trains: one line, and the same command goes on."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate.accelerator
import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from lcp_plugin.cli import main
from lcp_plugin.formats.identity import file_model_hash

FULL = Path("/dev/full")  # takes nothing: every write says that there is no space


@pytest.mark.skipif(not FULL.exists(), reason="a device of Linux")
def test_a_log_on_a_full_disk_is_one_line_and_the_run_goes_on(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "out" / "run" / "logs" / "steps.jsonl"
    log.parent.mkdir(parents=True)
    log.symlink_to(FULL)
    config = write_config("run", tasks=(0,))
    assert main(["--config", str(config)]) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.count("error: ") == 1
    assert "steps.jsonl could not be written (No space left on device)" in told
    log.unlink()
    assert main(["--config", str(config)]) == 0
    assert main(["--config", str(write_config("whole", tasks=(0,)))]) == 0
    hashes = [file_model_hash(tmp_path / "out" / f"{n}.safetensors") for n in ("run", "whole")]
    assert hashes[0] == hashes[1]


@pytest.fixture
def messages() -> Iterator[None]:
    """Puts the handlers of messages back."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    root.handlers[:] = before


@pytest.mark.skipif(not FULL.exists(), reason="a device of Linux")
@pytest.mark.usefixtures("messages")
def test_messages_on_a_full_disk_go_to_the_screen_and_the_run_ends_well(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "messages.txt").symlink_to(FULL)
    given = {"console_log_file": str(tmp_path / "messages.txt"), "clip_skip": 2}
    assert main(["--config", str(write_config("run", tasks=(0,), **given))]) == 0
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "Logging error" not in told
    assert "clip_skip has no effect" in told
    assert told.count("takes no more (No space left on device); messages go on here.") == 1


class FullTracker(GeneralTracker):  # type: ignore[misc]
    """Stands in for TensorBoard on a disk that is full from its second row on."""

    name = "tensorboard"
    requires_logging_directory = False
    tracker = None
    rows: int

    def __init__(self, run_name: str, **settings: Any) -> None:
        super().__init__()
        type(self).rows = 0

    def start(self) -> None:
        """Nothing to open."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing to keep."""

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        """Takes one row."""
        type(self).rows += 1
        if type(self).rows > 1:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_tracker_on_a_full_disk_is_one_line_and_the_run_goes_on(
    write_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (accelerate.tracking, accelerate.accelerator):
        if hasattr(module, "LOGGER_TYPE_TO_CLASS"):
            monkeypatch.setitem(module.LOGGER_TYPE_TO_CLASS, "tensorboard", FullTracker)
    kind = [LoggerType.TENSORBOARD]
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: kind)
    flags = ["--log_with", "tensorboard", "--logging_dir", str(tmp_path / "logs")]
    given = {"tasks": (0,), "resume_every_n_steps": 1}
    config = ["--config", str(write_config("run", **given))]
    assert main([*config, *flags]) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.count("error: ") == 1
    assert "a tracker could not write (No space left on device)" in told
    assert "goes on at step" not in told
    assert main(config) == 0
    assert "goes on at step" in capsys.readouterr().err
    assert main(["--config", str(write_config("whole", **given))]) == 0
    hashes = [file_model_hash(tmp_path / "out" / f"{n}.safetensors") for n in ("run", "whole")]
    assert hashes[0] == hashes[1]


def test_any_other_write_on_a_full_disk_is_one_line(
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Path.open

    def full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if path.name == "steps.jsonl" and mode == "a":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return whole(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    assert main(["--config", str(write_config("run", tasks=(0,)))]) == 1
    told = capsys.readouterr().err
    assert told.count("error: ") == 1
    assert "steps.jsonl could not be written (No space left on device)" in told
    monkeypatch.setattr(Path, "open", whole)
    assert main(["--config", str(write_config("run", tasks=(0,)))]) == 0


def test_a_folder_for_logs_that_cannot_be_made_is_one_line_before_a_model_loads(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "afile").write_text("x")
    given = {"log_with": "tensorboard", "logging_dir": str(tmp_path / "afile" / "logs")}
    assert main(["--config", str(write_config("run", tasks=(0,), **given)), "--dry_run"]) == 2
    assert "logging_dir" in capsys.readouterr().err
