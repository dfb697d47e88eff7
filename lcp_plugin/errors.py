"""Errors a user can mend. Each message is one line: what was got, what was wanted, what to do.

Where a page of the documentation explains more, the error names it (`Page`): a command line prints
it on a line of its own, `see docs/...`. A class has the page of most of its errors; `explaining`
gives one to what is raised inside of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum


class Page(StrEnum):
    """The pages that errors name, each with the heading that explains them."""

    OPTIONS = "configs/OPTIONS.md"
    TASKS = "configs/OPTIONS.md#a-task-tasks"
    STRATEGIES = "configs/OPTIONS.md#tasks-and-strategy"
    BASE = "configs/OPTIONS.md#base-model"
    MEMORY = "configs/OPTIONS.md#precision-and-memory"
    RESUMING = "configs/OPTIONS.md#saving-and-resuming"
    RECALL = "docs/recall.md#arguments"


class LcpError(Exception):
    """Base of every error that the command lines print as one line; they end with `exit_code`."""

    exit_code = 1
    page: Page | None = None  # that explains it

    @property
    def told(self) -> str:
        """What a command line prints: `error: ` before each line, and the page that explains it."""
        lines = [f"error: {line}" for line in str(self).split("\n")]
        return "\n".join([*lines, *([f"see {self.page}"] if self.page else [])])


@contextmanager
def explaining(page: Page, kind: type[LcpError] = LcpError) -> Iterator[None]:
    """Errors of `kind` that are raised inside name this page; the innermost `explaining` holds."""
    try:
        yield
    except kind as error:
        if "page" not in vars(error):
            error.page = page
        raise


class ConfigError(LcpError):
    """An option, a TOML key or a task that does not fit; `problems` lists all that were found."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DataError(LcpError):
    """A missing, empty or unreadable image, caption or folder."""

    page = Page.TASKS


class BaseModelError(LcpError):
    """A base model that is missing, damaged or not SDXL."""

    page = Page.BASE


class FileFormatError(LcpError):
    """A tensor or JSON file that is truncated, damaged, foreign or not allowed (pickle)."""


class LineageError(LcpError):
    """A parent or task folder of another run: wrong base, other strategy, broken hash."""

    page = Page.STRATEGIES


class StrategyError(LcpError):
    """A strategy or observer that is unknown, wrongly written or given wrong arguments."""

    page = Page.STRATEGIES


class NumericError(LcpError):
    """A NaN or infinity in a loss, a gradient, a latent or a tensor about to be saved."""


class DiskError(LcpError):
    """Too little space, or a write that failed; what was on disk before is whole."""


class ResumeError(LcpError):
    """A half-finished run whose settings differ from those it was started with."""

    page = Page.RESUMING


class FinishedError(ResumeError):
    """A run that has learned everything that its config asks for."""
