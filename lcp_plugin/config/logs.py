"""Messages and trackers, as kohya's logging options set them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lcp_plugin.config.options import Options
from lcp_plugin.config.tables import read_table
from lcp_plugin.errors import ConfigError

LIBRARIES = ("httpx", "accelerate", "PIL", "matplotlib")  # told of from WARNING on
SECRETS = ("wandb_api_key", "huggingface_token")


@dataclass(frozen=True)
class TrackerSettings:
    """What accelerate's trackers are started with."""

    names: tuple[str, ...]  # tensorboard, wandb
    folder: Path | None  # of TensorBoard's files
    project: str
    config: Mapping[str, Any] = field(default_factory=dict)  # logged once; empty without log_config
    start: Mapping[str, Any] = field(default_factory=dict)  # tracker name -> its own arguments
    wandb_api_key: str | None = None


class MessageFile(logging.FileHandler):
    """A file of messages; where it takes no more, they go to the screen, and the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Says once that the file takes no more."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        screen = logging.StreamHandler(sys.stderr)
        screen.setFormatter(self.formatter)
        logging.getLogger().removeHandler(self)
        logging.getLogger().addHandler(screen)
        with suppress(OSError):
            self.close()
        reason = error.strerror or error
        print(
            f"console_log_file {self.baseFilename} takes no more ({reason}); messages go on here.",
            file=sys.stderr,
        )
        screen.emit(record)


def configure_messages(options: Options) -> None:
    """Set the level and target of messages: console_log_level, console_log_file."""
    level = getattr(logging, options.console_log_level or "INFO")
    target: logging.Handler = logging.StreamHandler(sys.stderr)
    if options.console_log_file:
        Path(options.console_log_file).parent.mkdir(parents=True, exist_ok=True)
        target = MessageFile(options.console_log_file, encoding="utf-8")
    logging.basicConfig(level=level, format="%(message)s", handlers=[target], force=True)
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(max(level, logging.WARNING))


def tracker_settings(options: Options, now: datetime | None = None) -> TrackerSettings | None:
    """The trackers that log_with asks for; None without it. Raises ConfigError.

    As with kohya, TensorBoard's folder is <logging_dir>/<log_prefix><time>, `log_tracker_config` is
    a TOML with one table per tracker, and `wandb_run_name` names wandb's run.
    """
    if not options.log_with:
        return None
    names = ("tensorboard", "wandb") if options.log_with == "all" else (options.log_with,)
    if "tensorboard" in names and not options.logging_dir:
        raise ConfigError("log_with = tensorboard needs logging_dir: the folder of its files.")
    folder = None
    if options.logging_dir:
        stamp = (now or datetime.now()).strftime("%Y%m%d%H%M%S")
        folder = Path(options.logging_dir) / f"{options.log_prefix or ''}{stamp}"
    start: dict[str, Any] = {}
    if options.log_tracker_config:
        start = read_table(Path(options.log_tracker_config))
    if not all(isinstance(table, dict) for table in start.values()):
        raise ConfigError(
            f"log_tracker_config = {options.log_tracker_config!r}: wanted a table for each tracker "
            "([wandb], [tensorboard])."
        )
    if options.wandb_run_name and "wandb" in names:
        start["wandb"] = {**start.get("wandb", {}), "name": options.wandb_run_name}
    return TrackerSettings(
        names=names,
        folder=folder,
        project=options.log_tracker_name or "continual_sdxl",
        config=loggable_options(options) if options.log_config else {},
        start=start,
        wandb_api_key=options.wandb_api_key,
    )


def loggable_options(options: Options) -> dict[str, Any]:
    """All options as text and numbers, without secrets."""
    values = {k: v for k, v in asdict(options).items() if k not in SECRETS}
    return {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in values.items()
    }
