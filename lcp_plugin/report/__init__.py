"""One self-contained report.html per run, or for several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["write_report"]


def write_report(
    run_dirs: Path | Sequence[Path], scores: Path | None = None, output: Path | None = None
) -> Path:
    """The page of `report.page.write_report`; jinja2 and matplotlib are imported only now."""
    from lcp_plugin.report.page import write_report as write

    return write(run_dirs, scores, output)
