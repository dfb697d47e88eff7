"""Numbers with nouns, durations, clocks and commands, as every command says them."""

from __future__ import annotations

import ast
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lcp_plugin
from lcp_plugin.telling.wording import agree, counted, join_words, say_duration, say_moment

PACKAGE = Path(lcp_plugin.__file__).parent
NO_NUMBER = r"(?:has|have|is|holds|names|with|of|no|mixes|the) "  # a name stands before it
NEVER_ONE = {  # numbers above one where they are said, or names
    "config/path_lengths.py: characters",
    "data/contents.py: images",
    "doctor/machine.py: tasks",
    "evaluation/aggregate.py: runs",
    "evaluation/rehearsal_set.py: records",
    "evaluation/scores.py: tasks",
    "evaluation/scores.py: values",
    "evaluation/tables.py: runs",
    "formats/lora_keys.py: tensors",
    "report/page.py: runs",
    "sdxl/base_shapes.py: places",
    "watch/telling.py: tasks",
}


def test_one_of_a_thing_is_not_many() -> None:
    assert [counted(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert counted(2, "batch") == "2 batches"
    assert counted(2, "copy") == "2 copies"
    assert counted(2, "matrix", "matrices") == "2 matrices"
    assert counted(12345, "step") == "12,345 steps"
    assert (agree(1, "has", "have"), agree(3, "has", "have")) == ("has", "have")


def test_a_duration_has_the_unit_that_people_would_take() -> None:
    told = [say_duration(s) for s in (-1, 89, 90, 720, 9000, 7200, 50 * 3600, 72 * 3600)]
    assert told == ["0 s", "89 s", "2 min", "12 min", "2 h 30 min", "2 h", "2 d 2 h", "3 d"]


def test_a_moment_is_a_clock_with_its_day_where_that_is_another() -> None:
    noon = time.mktime((2026, 11, 27, 12, 0, 0, 0, 0, -1))
    assert say_moment(noon + 9120, noon) == "14:32"
    tomorrow = noon + 86400
    assert say_moment(tomorrow, noon) == time.strftime("%a 12:00", time.localtime(tomorrow))
    assert say_moment(noon + 10 * 86400, noon) == "2026-12-07"


@pytest.mark.parametrize(
    ("system", "line"),
    [
        ("posix", "lcp train --config 'my run.toml' out/a,b 'R&D' 'Tom'\"'\"'s'"),
        ("nt", 'lcp train --config "my run.toml" "out/a,b" "R&D" "Tom\'s"'),
    ],
)
def test_a_command_can_be_pasted_into_the_shell_at_hand(
    monkeypatch: pytest.MonkeyPatch, system: str, line: str
) -> None:
    words = ["lcp", "train", "--config", "my run.toml", "out/a,b", "R&D", "Tom's"]
    monkeypatch.setattr(os, "name", system)
    quoted = join_words(words)
    monkeypatch.undo()
    assert quoted.replace("'out/a,b'", "out/a,b") == line


def texts_with_numbers() -> Iterator[tuple[str, str]]:
    """(file, text behind a value) of each f-string, and of what the log is formatted by."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                for value, text in zip(node.values, node.values[1:], strict=False):
                    if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant):
                        yield name, str(text.value)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from ((name, found) for found in re.findall(r"%d( [^%]+)", node.value))


def nouns_that_are_counted() -> set[str]:
    """The plural of each noun that some text of ours counts."""
    calls = (
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "counted"
    )
    nouns = {str(n.value).split()[-1] for c in calls for n in c.args[1:2] if hasattr(n, "value")}
    return {agree(2, noun) for noun in nouns}


def test_no_text_says_1_images() -> None:
    """Each of them goes through `counted`, which knows one from many."""
    plurals = "|".join(sorted(nouns_that_are_counted()))
    assert "images" in plurals
    said = {
        f"{name}: {found[1]}"
        for name, text in texts_with_numbers()
        if (found := re.match(rf" ((?:(?!{NO_NUMBER})\w+ )?(?:{plurals}))\b", text))
    }
    assert said - NEVER_ONE == set()
    assert NEVER_ONE - said == set()


def test_no_text_leaves_the_plural_to_its_reader() -> None:
    sources = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.j2"), *PACKAGE.rglob("*.js")]
    found = [p.name for p in sources if re.search(r"\} \w+\(s\)", p.read_text("utf-8"))]
    assert found == []
