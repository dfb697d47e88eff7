"""A run's lock where a system has no fcntl, as Windows has none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lcp_plugin.errors import DiskError
from lcp_plugin.store.lock import locked

HOLD = """
import sys
from pathlib import Path

import filelock  # which on this system needs the module that ours is to do without

sys.modules["fcntl"] = None
from lcp_plugin.store.lock import locked

with locked(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_without_fcntl_a_second_process_is_refused_until_the_first_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("filelock")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(DiskError, match="another process"), locked(tmp_path, "run"):
        pass
    holder.kill()
    holder.communicate()
    for _ in range(2):
        with locked(tmp_path, "run"):
            pass


def test_an_error_inside_is_told_as_it_is_and_frees_the_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(OSError, match="of the body"), locked(tmp_path, "run"):
            raise OSError("of the body")
