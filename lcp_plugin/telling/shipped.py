"""Where configs and pages lie that belong to the package but are none of its modules.

In a checkout they stand beside `lcp_plugin/`; an installed package has them under share/lcp_plugin
of the environment, of the user's own folder (`pip install --user`) or of `pip install --target`.
"""

from __future__ import annotations

import site
import sys
from pathlib import Path

SHARE = Path("share") / "lcp_plugin"


def shipped_folders() -> list[Path]:
    """The folders that may hold `configs/` and `docs/`, a checkout's first."""
    root = Path(__file__).resolve().parents[2]
    installed = [root, Path(sys.prefix), Path(site.getuserbase())]
    return [root, *(place / SHARE for place in installed)]


def locate(name: str) -> str:
    """A shipped file as it can be opened: as named in a checkout, else where it is installed.

    `docs/files.md#merging` may become `/venv/share/lcp_plugin/docs/files.md#merging`; a file that
    is nowhere keeps its name.
    """
    file, mark, heading = name.partition("#")
    checkout, *installed = shipped_folders()
    if (checkout / file).is_file():
        return name
    found = next((place / file for place in installed if (place / file).is_file()), None)
    return f"{found}{mark}{heading}" if found else name
