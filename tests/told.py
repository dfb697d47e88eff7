"""What a command says of a user's mistake."""

from __future__ import annotations


def assert_one_error(text: str) -> None:
    """One line that begins with `error: `, and at most the page that explains it behind it."""
    first, *rest = text.strip().splitlines()
    assert first.startswith("error: ")
    assert len(rest) <= 1
    assert all(line.startswith("see ") for line in rest)
