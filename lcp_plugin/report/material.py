"""What a page is written from: runs, with what scores.json says of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcp_plugin.evaluation.recognition import Look, Recognition, read_recognition
from lcp_plugin.evaluation.scores import Matrix
from lcp_plugin.report.read import Facts, RunFacts


@dataclass(frozen=True)
class MetricScores:
    """One metric of one run."""

    matrix: Matrix
    base: tuple[float, ...]  # per task, NaN where the base was not scored


@dataclass(frozen=True)
class ScoredRun:
    """A run of the page, with what scores say of it."""

    number: int  # on the page, from 0
    run: RunFacts
    matrices: Mapping[str, MetricScores]
    recognition: Recognition | None
    looks: Mapping[str, Mapping[str, Look]]  # stage folder -> task name -> look


@dataclass(frozen=True)
class Material:
    """What a page is written from."""

    runs: tuple[ScoredRun, ...]
    scores: tuple[Facts, ...]  # parsed scores.json files

    @property
    def metrics(self) -> list[str]:
        """Of any run, in the order they were asked for."""
        return list(dict.fromkeys(name for one in self.runs for name in one.matrices))

    @property
    def is_comparison(self) -> bool:
        """Whether several runs stand side by side."""
        return len(self.runs) > 1


def gather(runs: Sequence[RunFacts], scores: Sequence[Facts]) -> Material:
    """The runs with the scores that know them; `scores` are empty where a file is missing."""
    found = []
    for number, run in enumerate(runs):
        mine = next((s for s in scores if _entry_of(s, run)), {})
        found.append(
            ScoredRun(
                number, run, scores_of(mine, run), recognition_of(mine, run),
                recognised_stages(mine, run),
            )
        )  # fmt: skip
    return Material(tuple(found), tuple(scores))


def scores_of(scores: Facts, run: RunFacts) -> dict[str, MetricScores]:
    """A run's matrices by metric; empty where `scores` does not know it."""
    found: dict[str, MetricScores] = {}
    for name, facts in _entry_of(scores, run).get("metrics", {}).items():
        if "matrix" not in facts:  # a ceiling has final scores only
            continue
        matrix = np.array([_numbers(row) for row in facts["matrix"]], dtype=np.float64)
        base = _numbers(facts.get("base") or [None] * len(matrix))
        found[name] = MetricScores(matrix, tuple(base))
    return found


def recognition_of(scores: Facts, run: RunFacts) -> Recognition | None:
    """What of a run is still recognised, where that was measured."""
    return read_recognition(_entry_of(scores, run))


def recognised_stages(scores: Facts, run: RunFacts) -> dict[str, dict[str, Look]]:
    """Stage folder (`03_boat`) -> task name -> its look, as far as they were scored."""
    entry, found = _entry_of(scores, run), recognition_of(scores, run)
    if found is None:
        return {}
    states = [str(stage.get("name", "")).removeprefix("after ") for stage in entry["stages"]]
    if any(len(row) != len(states) for row in found.looks):  # of a bound, final states alone
        return {}
    return {
        state: {
            name: look
            for name, row in zip(found.tasks, found.looks, strict=True)
            if (look := row[at]) is not None
        }
        for at, state in enumerate(states)
    }


def _entry_of(scores: Facts, run: RunFacts) -> Facts:
    """The run's entry, found by its folder's name (the only run there counts as it)."""
    entries = [e for e in scores.get("runs", ()) if isinstance(e, Mapping)]
    mine = [e for e in entries if e.get("name") in (run.folder.name, run.name)]
    if len(mine) != 1 and run.folder.as_posix() in [e.get("path") for e in entries]:
        mine = [e for e in entries if e.get("path") == run.folder.as_posix()]
    return mine[0] if len(mine) == 1 else {}


def _numbers(row: Sequence[Any]) -> list[float]:
    return [math.nan if value is None else float(value) for value in row]
