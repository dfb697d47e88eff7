"""The command `lcp`: its verbs, and how each of them ends.

A verb is a module of this room with `build_parser()` and `main(argv)`. It is imported when it is
asked for, and what it needs of torch when it works: `lcp`, `lcp --help` and a verb's `--help` cost
Python's own start. Whatever goes wrong is lines that begin with `error: ` on stderr, and the exit
code of the error's class.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Protocol

from lcp_plugin import __version__
from lcp_plugin.errors import ConfigError, LcpError, Page, explaining

INTERRUPTED = 130
CLOSED_PIPE = 141  # as a shell counts a program that SIGPIPE has ended


@dataclass(frozen=True)
class Verb:
    """A row of the overview."""

    name: str
    about: str
    page: Page | None = None  # that explains its options
    module: str = ""  # in this room, where it is not called as the verb
    goes_on: bool = False  # stopped and given again, it makes nothing twice

    @property
    def path(self) -> str:
        """The module that has its `main`."""
        return f"lcp_plugin.commands.{self.module or self.name}"


GROUPS: tuple[tuple[str, tuple[Verb, ...]], ...] = (
    (
        "Learn",
        (
            Verb(
                "init",
                "a folder of folders of photos becomes a commented config that runs",
                Page.INIT,
            ),
            Verb("train", "learn a sequence of tasks, one LoRA for all; takes kohya's options"),
        ),
    ),
    (
        "Look",
        (
            Verb("watch", "a page in your browser that shows a run while it runs"),
            Verb(
                "evaluate",
                "score what a run has learned and forgotten",
                Page.SCORES,
                goes_on=True,
            ),
            Verb("report", "one HTML page for one run, or for several side by side"),
            Verb("conflicts", "what collides between tasks, or between LoRA files", Page.MERGING),
            Verb(
                "lineage",
                "where a LoRA comes from, anyone's; TOML that trains it again",
                Page.LINEAGE,
            ),
        ),
    ),
    (
        "Compare",
        (
            Verb(
                "compare",
                "recall and the paper's four on the same tasks",
                Page.SCORES,
                goes_on=True,
            ),
            Verb(
                "sweep",
                "strategies x orders x seeds, here or on Slurm",
                Page.SCORES,
                goes_on=True,
            ),
        ),
    ),
    (
        "Take along",
        (
            Verb(
                "merge",
                "LoRA files that were trained apart into one, exactly or by a rule",
                Page.MERGING,
            ),
            Verb("export", "a LoRA for any reader, or fused into a checkpoint", Page.FORMS),
            Verb(
                "rehearse",
                "draw what a LoRA knows, as regularisation images for any trainer",
                Page.DRAWING,
                goes_on=True,
            ),
        ),
    ),
    (
        "Know",
        (
            Verb("doctor", "what this machine has, and which preset fits", Page.PRESETS),
            Verb("options", "every option of train, with defaults and kohya's differences"),
            Verb("completion", "what makes bash, zsh or tcsh complete all of this"),
        ),
    ),
)
VERBS = {verb.name: verb for _, verbs in GROUPS for verb in verbs}


# ------------------------------------------------------------------------------ how a verb ends


class Main(Protocol):
    """A verb's `main`."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Returns the exit status; arguments that are not given are the process's own."""
        ...


def command(serve: Callable[[Sequence[str]], int]) -> Main:
    """A verb's `main`: `serve` with the process's own arguments unless others are given.

    The errors of a user become lines on stderr, with the verb's page where they have none, and an
    exit status; others are bugs and stay.
    """
    verb = next((v for v in VERBS.values() if v.path == serve.__module__), Verb("", ""))

    @wraps(serve)
    def main(argv: Sequence[str] | None = None) -> int:
        try:
            with explaining(verb.page, ConfigError):
                return serve(sys.argv[1:] if argv is None else argv)
        except LcpError as error:
            print(error.told, file=sys.stderr)
            return error.exit_code
        except ModuleNotFoundError as error:
            if (error.name or "lcp_plugin").split(".")[0] == "lcp_plugin":
                raise
            print(f"error: {error.name} is missing: pip install {error.name}.", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            more = "; the same command goes on" if verb.goes_on else ""
            print(f"stopped{more}.", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # `lcp options | head`
            sys.stdout = None  # Python would complain of it at its end
            return CLOSED_PIPE
        except OSError as error:
            from lcp_plugin.formats.disk import explain_os_error

            if (full := explain_os_error(error)) is None:
                raise
            print(full.told, file=sys.stderr)
            return full.exit_code

    return main


def tell_progress() -> None:
    """Messages of ours go to stderr as they come, other packages' from warnings on."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lcp_plugin").setLevel(logging.INFO)


# ------------------------------------------------------------------------------ the command itself


@command
def main(argv: Sequence[str]) -> int:
    """`lcp VERB ...`; returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(describe_verbs())
        return 0
    first, rest = argv[0], argv[1:]
    if first in ("-V", "--version"):
        print(f"lcp {__version__}")
        return 0
    if first == "help":
        return main([*rest[:1], "--help"])
    verb: Main = importlib.import_module(find_verb(argv).path).main
    return verb(rest)


def find_verb(argv: Sequence[str]) -> Verb:
    """The verb that the first argument names. Raises ConfigError with what was meant."""
    first = argv[0]
    if first in VERBS:
        return VERBS[first]
    if first.endswith(".toml"):
        from lcp_plugin.telling.wording import quote

        raise ConfigError(f"{first!r} is no verb. Did you mean lcp train --config {quote(first)}?")
    if first.startswith("-"):
        raise ConfigError(f"{first} stands before a verb. Did you mean lcp train {first}?")
    import difflib

    found = difflib.get_close_matches(first.lower(), VERBS, n=1, cutoff=0.5)
    hint = f" Did you mean lcp {found[0]}?" if found else ""
    raise ConfigError(f"{first!r} is no verb of lcp.{hint} `lcp` lists them.")


def describe_verbs() -> str:
    """The overview: a line for each verb."""
    width = max(map(len, VERBS))
    lines = [
        f"lcp {__version__}: teach SDXL one thing after another, and keep them all",
        "",
        "usage: lcp VERB ...     lcp VERB --help",
    ]
    for title, verbs in GROUPS:
        lines += ["", title, *(f"  {verb.name:{width}}  {verb.about}" for verb in verbs)]
    return "\n".join(lines)
