"""Prints what makes a shell complete the verbs and options of `lcp`.

    lcp completion bash > ~/.local/share/bash-completion/completions/lcp
    lcp completion zsh > ~/.zfunc/_lcp            # with ~/.zfunc in fpath, before compinit
    lcp completion tcsh > ~/.lcp.completion.csh   # source it in ~/.cshrc

The file is written once and holds all that is completed: no Tab starts Python. Written again after
an update it knows the new options. tcsh offers the options of all verbs behind each of them. Needs
shtab: pip install "lcp-plugin[completion]".
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from lcp_plugin.commands.front import VERBS, Verb, command
from lcp_plugin.config.flags import build_parser as build_training_parser
from lcp_plugin.config.options import option_fields
from lcp_plugin.config.parser import Parser

SHELLS = ("bash", "zsh", "tcsh")


def build_parser() -> argparse.ArgumentParser:
    """Which shell."""
    parser = Parser("completion", __doc__, "SHELL")
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return parser


@command
def main(argv: Sequence[str]) -> int:
    """Prints the script; returns the exit status."""
    args = build_parser().parse_args(argv)
    import shtab

    print(shtab.complete(join_verbs(shtab.FILE), shell=args.shell))
    return 0


def join_verbs(files: dict[str, str]) -> argparse.ArgumentParser:
    """One parser that knows every verb; what takes a value without choices completes `files`."""
    parser = argparse.ArgumentParser(prog="lcp")
    parser.add_argument("-V", "--version", action="store_true", help="the version")
    verbs = parser.add_subparsers(dest="verb")
    for verb in VERBS.values():
        one = verbs.add_parser(
            verb.name, parents=[parser_of(verb)], add_help=False, help=verb.about
        )
        for action in one._actions:
            if action.dest in option_fields() and verb.name == "train":
                action.choices = option_fields()[action.dest].metadata["choices"] or None
            if action.nargs != 0 and not action.choices:
                action.complete = files  # type: ignore[attr-defined]  # what shtab reads
    return parser


def parser_of(verb: Verb) -> argparse.ArgumentParser:
    """The parser of a verb, training's with its rare options."""
    if verb.name == "train":
        return build_training_parser(everything=True)
    parser: argparse.ArgumentParser = importlib.import_module(verb.path).build_parser()
    return parser


if __name__ == "__main__":
    sys.exit(main())
