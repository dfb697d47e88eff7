"""The shape of scores.json as pages rely on it: types, and lengths that agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from lcp_plugin.errors import FileFormatError
from lcp_plugin.formats.shapes import Maybe, Shape, check_shape
from lcp_plugin.telling.wording import counted

_NUMBER, _TEXT = (float, NoneType), (str, NoneType)
_TABLES = ([[float]], [[_NUMBER]])
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
EXTRAS: dict[str, dict[str, Shape]] = {  # what a page takes of each measure of --extras
    "bleed": {"matrix": [[float]], "base": [[float]]},
    "leakage": {"mean": Maybe(_NUMBER)},
    "drift": {"after": [float]},
    "diversity": {"final": {str: _NUMBER}, "base": {str: _NUMBER}},
    "multi": {"mean": Maybe(_NUMBER)},
    "recognition": {"mean": {"learned": float, "final": float, "base": float, "covered": _NUMBER}},
    "losses": {
        "normalised": [[_NUMBER]],
        "self_drift": [[_NUMBER]],
        "rank_correlation": {"loss_gain": _NUMBER, "self_drift": _NUMBER},
    },
}
SCORES = {
    "format": Maybe(int),
    "sampling": Maybe(dict),
    "encoders": Maybe({str: dict}),
    "runs": [ENTRY],
    "strategies": Maybe({str: {str: dict}}),
    "differences": Maybe([_DIFFERENCE]),
    "extras": Maybe(
        {
            "about": Maybe({str: str}),
            "runs": Maybe({str: {name: Maybe(shape) for name, shape in EXTRAS.items()}}),
        }
    ),
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
    found = [words for entry in scores["runs"] for words in _misfits(entry, path)]
    for run, extras in scores.get("extras", {}).get("runs", {}).items():
        found += _uneven_tables(run, extras)
    if found:
        raise FileFormatError(f"{path} is not as it was written: {found[0]}; {_ADVICE}")
    return scores


def _uneven_tables(run: str, extras: Mapping[str, Any]) -> Iterator[str]:
    """Tables of a run's extras that have no rows, or rows of no or of several lengths, in words."""
    for measure, shape in EXTRAS.items():
        for name in (n for n, inner in shape.items() if measure in extras and inner in _TABLES):
            lengths = {len(row) for row in extras[measure][name]}
            if len(lengths) != 1 or 0 in lengths:
                yield f"{run}'s {measure}.{name} is no table of rows of one length"


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
