"""What a run says: in its console, its log file, to a tracker, and when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toml
import torch

from lcp_plugin.cli import main

Train = Callable[..., Any]


WriteConfig = Callable[..., Path]


def test_output_config_writes_the_given_options_and_stops(
    tmp_path: Path, toy_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    flags = ["--output_config", "--config_file", str(path), "--network_dim", "8"]
    assert main(flags) == 0
    assert toml.loads(path.read_text()) == {"network_dim": 8}
    assert main(flags) == 2
    assert "exists" in capsys.readouterr().err


def test_console_log_file_takes_the_messages(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "logs" / "run.log"
    config = write_config("run", tasks=(0,), blocks_to_swap=3, console_log_file=str(log))
    assert main(["--config", str(config)]) == 0
    assert log.read_text().count("blocks_to_swap has no effect") == 1
    assert "blocks_to_swap" not in capsys.readouterr().err
    logging.basicConfig(force=True)


def test_console_log_level_hides_notices(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config("run", tasks=(0,), blocks_to_swap=3, console_log_level="ERROR")
    assert main(["--config", str(config)]) == 0
    assert "blocks_to_swap" not in capsys.readouterr().err
    logging.basicConfig(force=True)


def test_a_log_file_that_cannot_be_written_is_one_line(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config("run", tasks=(0,), console_log_file=str(tmp_path))
    assert main(["--config", str(config)]) == 2
    assert "console_log_file" in capsys.readouterr().err


def test_notices_are_said_once_and_not_again_when_a_run_goes_on(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(write_config("run", tasks=(0,), blocks_to_swap=3))]) == 0
    assert capsys.readouterr().err.count("blocks_to_swap has no effect") == 1
    assert main(["--config", str(write_config("run", tasks=(0, 1), blocks_to_swap=3))]) == 0
    assert "blocks_to_swap" not in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_one_notice(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    run = train("run", tasks=(0,), log_with="tensorboard", logging_dir=str(tmp_path / "logs"))
    assert run.facts["said"] == [
        "log_with = tensorboard: nothing is logged; pip install tensorboard."
    ]


def test_a_tracker_gets_options_losses_and_the_validation_loss(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import GeneralTracker

    from lcp_plugin.run import opening, trackers

    rows: list[tuple[dict[str, Any], int | None]] = []
    told: dict[str, Any] = {}

    class Fake(GeneralTracker):  # type: ignore[misc]
        name = "fake"
        requires_logging_directory = False

        def __init__(self) -> None:
            super().__init__()

        @property
        def tracker(self) -> None:
            return None

        def start(self) -> None:
            told["started"] = True

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.update(values)

        def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
            rows.append((values, step))

    fake = Fake()
    for module in (opening, trackers):
        monkeypatch.setattr(module, "usable_trackers", lambda given: [fake] if given else [])
    train(
        "run",
        tasks=(0,),
        log_with="tensorboard",
        logging_dir=str(tmp_path / "logs"),
        log_prefix="mine_",
        log_config=True,
        validation_split=0.4,
        validate_every_n_steps=3,
    )
    assert told["started"]
    assert told["network_dim"] == 2
    assert "wandb_api_key" not in told
    assert [step for values, step in rows if "loss/disc0" in values] == [1, 2, 3]
    assert [step for values, step in rows if "loss/validation/disc0" in values] == [3]
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("mine_")


def test_running_out_of_memory_names_the_flags_that_help(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcp_plugin.run import opening

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(opening, "load_pipeline", full)
    assert main(["--config", str(write_config("run", tasks=(0,)))]) == 1
    text = capsys.readouterr().err
    assert "--gradient_checkpointing" in text
    assert "Traceback" not in text
