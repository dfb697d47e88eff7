"""The shape of scores.json as pages rely on it: types, and lengths that agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from lcp_plugin.errors import FileFormatError
from lcp_plugin.formats.shapes import Maybe, check_shape
from lcp_plugin.telling.wording import counted

_NUMBER, _TEXT = (float, NoneType), (str, NoneType)
_LOOK = {"share": float, "other": Maybe(_TEXT), "other_share": Maybe(float)}
_DIFFERENCE = {
    "metric": str,
    "measure": str,
    "a": str,
    "b": str,
    "difference": float,
    "low": float,
    "high": float,
    "pairs": int,
}
ENTRY = {  # of a run
    "name": str,
    "path": Maybe(str),
    "strategy": Maybe(str),
    "label": Maybe(str),
    "tasks": Maybe([str]),
    "stages": Maybe([{"name": str}]),
    "ceiling": Maybe(bool),
    "metrics": {
        str: {
            "matrix": Maybe([[_NUMBER]]),
            "base": Maybe([_NUMBER]),
            "ceiling": Maybe([_NUMBER]),
            "average_score": Maybe(float),
        }
    },
}
SCORES = {
    "format": Maybe(int),
    "sampling": Maybe(dict),
    "encoders": Maybe({str: dict}),
    "runs": [ENTRY],
    "strategies": Maybe({str: {str: dict}}),
    "differences": Maybe([_DIFFERENCE]),
    "extras": Maybe({"about": Maybe({str: str}), "runs": Maybe({str: {str: dict}})}),
}
_RECOGNISED = {  # what such an entry needs besides
    "tasks": [str],
    "stages": [{"name": str}],
    "recognition": {"metric": str, "images": int, "looks": [list], "base": [_LOOK]},
}
_ADVICE = "wanted scores.json of lcp evaluate."


def check_scores(value: Any, path: Path) -> Mapping[str, Any]:
    """What a scores.json holds. Raises FileFormatError: one line."""
    scores: Mapping[str, Any] = check_shape(value, SCORES, path, _ADVICE)
    for entry in scores["runs"]:
        for words in _misfits(entry, path):
            raise FileFormatError(f"{path} is not as it was written: {words}; {_ADVICE}")
    return scores


def _misfits(entry: Mapping[str, Any], path: Path) -> Iterator[str]:
    """What of a run's entry contradicts itself, in words."""
    name, tasks = entry["name"], entry.get("tasks")
    for metric, found in entry["metrics"].items():
        lists = [found[key] for key in ("matrix", "base") if key in found]
        count = len(lists[0]) if lists and tasks is None else len(tasks or ())
        if any(len(rows) != count for rows in lists):
            yield f"{name}'s {metric} is not of {counted(count, 'task')}"
        elif any(len(row) != count for row in found.get("matrix", ())):
            yield f"{name}'s {metric} has rows that are not of {counted(count, 'number')}"
    if not (recognition := entry.get("recognition")):
        return
    check_shape(entry, _RECOGNISED, path, _ADVICE)
    looks = recognition["looks"]
    counts = {len(looks), len(recognition["base"]), len(entry["tasks"])}
    if len(counts) > 1 or len({len(row) for row in looks}) > 1:
        yield f"{name}'s recognition is not of {counted(len(entry['tasks']), 'task')}"
    for look in (look for row in looks for look in row if look is not None):
        check_shape(look, _LOOK, path, _ADVICE)
