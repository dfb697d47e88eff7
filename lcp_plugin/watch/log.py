"""logs/steps.jsonl, followed as it grows: of every look only the new lines are read.

The last line may be half written, and the file may be another one than before (--overwrite starts a
run over): what has no line end is left for the next look, and a file that shrank or was replaced is
read from its start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Facts = Mapping[str, Any]


class StepLog:
    """The lines of one log so far; of a step that was repeated after a kill the last counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.steps: dict[tuple[int, int], Facts] = {}  # (task index, step)
        self.latest: Facts = {}  # step, in the order of writing
        self.last: Facts = {}  # line of any event
        self._file, self._offset, self._rest = -1, 0, b""

    def follow(self) -> None:
        """Reads what came since the last look; without a file nothing is known."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._file or found.st_size < self._offset:
                    self._forget()
                    self._file = found.st_ino
                file.seek(self._offset)
                new = file.read()
        except OSError:
            self._forget()
            return
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            fact = json.loads(line)
            if fact["event"] == "step":
                self.steps[int(fact["task_index"]), int(fact["step"])] = fact
                self.latest = fact
            self.last = fact
        except (ValueError, KeyError, TypeError):
            return  # a line cut off by a kill, or another program's

    def ordered(self) -> tuple[Facts, ...]:
        """The steps in the order of training."""
        return tuple(self.steps[key] for key in sorted(self.steps))
