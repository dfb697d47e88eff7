"""The parser of every command line: its help and its errors look alike."""

from __future__ import annotations

import argparse
import math
import re
import shutil
from typing import NoReturn

from lcp_plugin.errors import ConfigError
from lcp_plugin.seeds import LARGEST_SEED

_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """argparse's own, with room for long names, and lines that are not too long to read."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size((100, 40)).columns - 2, 100)
        super().__init__(prog, max_help_position=34, width=width)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` of a verb of `lcp`; a mistake is a ConfigError, and no usage is printed.

    Args:
        verb: of `lcp`.
        about: its module's docstring, examples included, printed as it stands.
        wants: what the usage line names, like "RUN ..."; options are behind it.
        abbreviations: whether `--out` means `--output`.
    """

    def __init__(
        self, verb: str, about: str | None, wants: str = "", abbreviations: bool = True
    ) -> None:
        super().__init__(
            prog=f"lcp {verb}",
            usage=f"lcp {verb} {wants} [--option value ...]".replace("  ", " "),
            description=about,
            formatter_class=Formatter,
            allow_abbrev=abbreviations,
        )
        self._negative_number_matcher = _NEGATIVE  # argparse's own takes -1e-3 for an option

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{self.prog}: {message}; {self.prog} --help has its options.")


def finite(text: str) -> float:
    """A number that is neither NaN nor infinite, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a finite number")
    return number


def seed(text: str) -> int:
    """A seed that torch takes, for argparse: from 0, of 63 bits."""
    if not text.isdecimal() or len(text) > 19 or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}; wanted a whole number, 0 to 2^63 - 1")
    return int(text)


def count(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a whole number, 1 or more")
    return int(text)
