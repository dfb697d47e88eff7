"""Runs' folders in every state that `lcp watch` may find them in, and its server around one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from report_samples import NAMES, make_run

from lcp_plugin.watch.server import Server

COMMAND = {"line": "lcp train --config 'my run.toml'", "folder": "/somewhere/else"}
HOLD = """
import sys
from pathlib import Path
from lcp_plugin.store.lock import locked
with locked(Path(sys.argv[1]), "mine"):
    print("held", flush=True)
    sys.stdin.read()
"""


def line(event: str, task: int = 1, **facts: Any) -> dict[str, Any]:
    """A line of the log, as the observer jsonl writes it."""
    return {
        "time": time.time(), "event": event, "task": NAMES[task - 1], "task_index": task, **facts,
    }  # fmt: skip


def steps(task: int, first: int, last: int, total: int = 60, end: float = 0.0) -> list[Any]:
    """Steps of a task, two seconds each, the last of them `end` seconds ago."""
    now = time.time() - end
    rehearsal = {} if task == 1 else {"rehearsal": 0.05}
    return [
        line("step", task, step=n, total=total, loss=0.25, seconds=2.0, peak_memory_mb=7900.0,
             **rehearsal) | {"time": now - 2.0 * (last - n)}
        for n in range(first, last + 1)
    ]  # fmt: skip


def write_log(folder: Path, lines: list[Any], rest: str = "", mode: str = "w") -> None:
    """logs/steps.jsonl; `rest` is a line that was cut off."""
    with (folder / "logs" / "steps.jsonl").open(mode, encoding="utf-8") as file:
        file.write("".join(json.dumps(one) + "\n" for one in lines) + rest)


def edit_run(folder: Path, **facts: Any) -> None:
    """run.json with other facts; None takes one out."""
    path = folder / "run.json"
    known = {**json.loads(path.read_text("utf-8")), **facts}
    path.write_text(json.dumps({k: v for k, v in known.items() if v is not None}))


def make_unfinished(folder: Path, *log: Any) -> Path:
    """A run that learned its first task and is at the 37th of 60 steps of the second."""
    make_run(folder)
    for stage in ("02_evil", "03_teapot"):
        shutil.rmtree(folder / stage)
        shutil.rmtree(folder / "samples" / stage)
    shutil.rmtree(folder / "evaluation")
    edit_run(folder, status="running", command=COMMAND)
    write_log(folder, [*steps(1, 1, 60, end=90), line("task_end"), *steps(2, 1, 37), *log])
    return folder


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own holds the run's lock, as one that trains does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=30)


class Answer(NamedTuple):
    """What a server answered."""

    status: int
    headers: Any
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode("utf-8")


class Client:
    """Asks one server; every answer is a fresh look at the run."""

    def __init__(self, server: Server) -> None:
        self.server, self.address = server, server.address

    def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        self.server.view._looked = float("-inf")  # else the same look would serve for a second
        request = urllib.request.Request(self.address + path, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as found:
                return Answer(found.status, found.headers, found.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())

    def live(self) -> dict[str, Any]:
        """The pieces of the page."""
        found = self.ask("live")
        assert found.status == 200, found.text
        return dict(json.loads(found.data))


@contextmanager
def served(folder: Path) -> Iterator[Client]:
    """The page of a run, served."""
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield Client(server)
        finally:
            server.shutdown()
            thread.join()
