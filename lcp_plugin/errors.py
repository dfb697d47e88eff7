"""Errors a user can mend. Each message is one line: what was got, what was wanted, what to do.

Where a page of the documentation explains more, the error names it (`Page`): a command line prints
it behind the last line, `See docs/...`, or where an installed package has it. A class has the page
of most of its errors; `explaining` gives one to what is raised inside of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum


class Page(StrEnum):
    """The pages that errors name, each with the heading that explains them."""

    OPTIONS = "configs/OPTIONS.md"
    BASE = "configs/OPTIONS.md#base-model"
    PHOTOS = "docs/tutorial.md#2-lay-out-the-photos"
    INIT = "docs/tutorial.md#3-let-lcp-init-write-the-config"
    STRATEGIES = "docs/strategies.md#which-one"
    STRATEGY_CHANGE = "docs/strategies.md#changing-the-strategy-of-a-chain"
    RECALL = "docs/recall.md#arguments"
    HOOKS = "docs/write_a_strategy.md#the-hooks"
    OBSERVERS = "docs/write_a_strategy.md#an-observer"
    CHAINS = "docs/questions.md#3-resume-continue-fuse-which-of-them-do-i-want"
    RESUMING = "docs/questions.md#7-it-was-killed-does-it-go-on-or-start-at-0"
    MEMORY = "docs/questions.md#9-does-it-fit-8-or-12-gb"
    PRESETS = "docs/speed.md#which-preset-fits-my-card"
    RUNS = "docs/files.md#what-a-run-writes"
    LORAS = "docs/readers.md#what-is-read-of-others-files"
    ONETRAINER = "docs/coming_from.md#onetrainer"
    AI_TOOLKIT = "docs/coming_from.md#ai-toolkit"
    SIMPLETUNER = "docs/coming_from.md#simpletuner"
    LINEAGE = "docs/files.md#what-a-lora-was-trained-on"
    MERGING = "docs/files.md#merging"
    FORMS = "docs/files.md#other-forms"
    DRAWING = "docs/files.md#drawing-what-a-lora-knows"
    SCORES = "docs/evaluation.md#what-is-measured"


class LcpError(Exception):
    """Base of every error that the command lines print as one line; they end with `exit_code`."""

    exit_code = 1
    page: Page | None = None  # that explains it

    @property
    def told(self) -> str:
        """What a command line prints: `error: ` before each line, and the page that explains it."""
        from lcp_plugin.telling.shipped import locate

        told = "\n".join(f"error: {line}" for line in str(self).split("\n"))
        if not self.page:
            return told
        return f"{told}{'' if told.endswith(('.', '?', '!')) else '.'} See {locate(self.page)}"


@contextmanager
def explaining(page: Page | None, kind: type[LcpError] = LcpError) -> Iterator[None]:
    """Errors of `kind` that are raised inside name this page; the innermost `explaining` holds."""
    try:
        yield
    except kind as error:
        if page is not None and "page" not in vars(error):
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

    page = Page.PHOTOS


class RunFolderError(DataError):
    """A folder that is no run's, or none that is as far as it must be."""

    page = Page.RUNS


class ScoringError(DataError):
    """What a score needs beside the model and is not there: references, prompts, images."""

    page = Page.SCORES


class BaseModelError(LcpError):
    """A base model that is missing, damaged or not SDXL."""

    page = Page.BASE


class FileFormatError(LcpError):
    """A tensor or JSON file that is truncated, damaged, foreign or not allowed (pickle)."""

    page = Page.LORAS


class EncoderError(FileFormatError):
    """An encoder of the evaluation that is missing, or not the file that it should be."""

    page = Page.SCORES


class LineageError(LcpError):
    """A parent or task folder of another run: wrong base, other strategy, broken hash."""

    page = Page.CHAINS


class TaskFolderError(LineageError):
    """A task folder that is incomplete, changed, damaged or of another version."""

    page = Page.RUNS


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
