"""The longest path that a run writes, which Windows may refuse: told before anything is trained.

Of what lies below <output_dir>/<output_name> either a sample or a file of a task's state is the
deepest; both are written under a longer name first (`disk.replacing`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lcp_plugin.config.findings import Findings
from lcp_plugin.config.names import LONGEST_PATH
from lcp_plugin.config.options import Options


def check_path_lengths(
    options: Options,
    tasks: Sequence[str],
    provenance: Mapping[str, str],
    findings: Findings,
) -> None:
    """A problem where this system refuses the longest path of a run over tasks of these names."""
    if not tasks or takes_long_paths():
        return
    name = max(tasks, key=len)
    path = str(longest_path(options, name))
    if len(path) > LONGEST_PATH:
        findings.problem(
            provenance.get("output_dir", ""),
            f"output_dir: the longest path of this run has {len(path)} characters, Windows takes "
            f"{LONGEST_PATH}: {path}; shorten output_dir, output_name or the task's name {name!r} "
            f"by {len(path) - LONGEST_PATH} in all, or set LongPathsEnabled in Windows' registry.",
        )


def longest_path(options: Options, task: str) -> Path:
    """The longest path that a run with this task writes, absolute."""
    from lcp_plugin.formats.disk import temporary_beside

    run = Path(options.output_dir or "output").absolute() / (options.output_name or "last")
    folder = f"01_{task}"
    paths = [run / "state" / f"{folder}_step00000100" / "optimizer.safetensors"]
    if options.samples_per_task:
        last = options.samples_per_task - 1
        paths.append(run / "samples" / folder / f"{task}_{last}.png")
    return max(map(temporary_beside, paths), key=lambda path: len(str(path)))


def takes_long_paths() -> bool:
    """Whether paths may have any length: but on Windows, where its owner must have allowed it."""
    if sys.platform == "win32":
        import winreg

        place = r"SYSTEM\CurrentControlSet\Control\FileSystem"
        try:
            with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, place) as key:
                return bool(winreg.QueryValueEx(key, "LongPathsEnabled")[0])
        except OSError:  # a Windows older than the setting
            return False
    return True
