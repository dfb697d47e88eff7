"""What a command says of a user's mistake."""

from __future__ import annotations


def assert_one_error(text: str) -> None:
    """One line that begins with `error: `."""
    (line,) = text.strip().splitlines()
    assert line.startswith("error: ")
