"""Messages and trackers as kohya's logging options set them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from lcp_plugin.config.logs import configure_messages, loggable_options, tracker_settings
from lcp_plugin.config.options import Options
from lcp_plugin.errors import ConfigError

NOW = datetime(2026, 1, 2, 3, 4, 5)


@pytest.fixture
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("_root_logger")
def test_messages_go_to_a_file_from_a_level_on(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "run.log"
    configure_messages(Options(console_log_file=str(file), console_log_level="WARNING"))
    logging.getLogger("lcp_plugin.test").info("quiet")
    logging.getLogger("lcp_plugin.test").warning("loud")
    assert file.read_text() == "loud\n"


def test_without_log_with_there_is_no_tracker() -> None:
    assert tracker_settings(Options(logging_dir="logs")) is None


def test_tensorboards_folder_has_prefix_and_time() -> None:
    options = Options(log_with="tensorboard", logging_dir="logs", log_prefix="dog_")
    settings = tracker_settings(options, NOW)
    assert settings is not None
    assert settings.folder == Path("logs/dog_20260102030405")
    assert settings.names == ("tensorboard",)
    assert settings.config == {}


def test_wandb_gets_its_name_key_and_own_settings(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text("[wandb]\nentity = 'me'\n")
    options = Options(
        log_with="all",
        logging_dir="logs",
        log_tracker_name="project",
        wandb_run_name="run",
        wandb_api_key="key",
        log_tracker_config=str(file),
    )
    settings = tracker_settings(options, NOW)
    assert settings is not None
    assert settings.names == ("tensorboard", "wandb")
    assert settings.start == {"wandb": {"entity": "me", "name": "run"}}
    assert (settings.project, settings.wandb_api_key) == ("project", "key")


def test_the_logged_config_has_no_secret() -> None:
    options = Options(log_with="wandb", log_config=True, wandb_api_key="key", learning_rate=1e-4)
    settings = tracker_settings(options, NOW)
    assert settings is not None
    assert settings.config["learning_rate"] == 1e-4
    assert "wandb_api_key" not in loggable_options(options)


def test_tensorboard_without_a_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="logging_dir"):
        tracker_settings(Options(log_with="tensorboard"))
