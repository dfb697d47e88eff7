"""Errors a user can mend. Each message is one line: what was got, what was wanted, what to do."""

from __future__ import annotations


class LcpError(Exception):
    """Base of every error that the command lines print as one line; they end with `exit_code`."""

    exit_code = 1

    @property
    def told(self) -> str:
        """What a command line prints: `error: ` before each line."""
        return "\n".join(f"error: {line}" for line in str(self).split("\n"))


class ConfigError(LcpError):
    """An option, a TOML key or a task that does not fit; `problems` lists all that were found."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DataError(LcpError):
    """A missing, empty or unreadable image, caption or folder."""


class BaseModelError(LcpError):
    """A base model that is missing, damaged or not SDXL."""


class FileFormatError(LcpError):
    """A tensor or JSON file that is truncated, damaged, foreign or not allowed (pickle)."""


class LineageError(LcpError):
    """A parent or task folder of another run: wrong base, other strategy, broken hash."""


class StrategyError(LcpError):
    """A strategy or observer that is unknown, wrongly written or given wrong arguments."""


class NumericError(LcpError):
    """A NaN or infinity in a loss, a gradient, a latent or a tensor about to be saved."""


class DiskError(LcpError):
    """Too little space, or a write that failed; what was on disk before is whole."""


class ResumeError(LcpError):
    """A half-finished run whose settings differ from those it was started with."""


class FinishedError(ResumeError):
    """A run that has learned everything that its config asks for."""
