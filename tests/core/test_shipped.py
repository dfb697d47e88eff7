"""Where a page lies that an error names: beside the package, or where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcp_plugin.errors import DataError, Page
from lcp_plugin.telling import shipped


def test_a_checkouts_page_keeps_its_name() -> None:
    assert shipped.locate(Page.RUNS) == Page.RUNS
    assert DataError("no photo").told == f"error: no photo. See {Page.PHOTOS}"


@pytest.mark.parametrize("place", ["target", "prefix", "user"])
def test_an_installed_package_names_the_file_that_can_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    package = tmp_path / "target" / "lcp_plugin" / "telling"
    monkeypatch.setattr(shipped, "__file__", str(package / "shipped.py"))
    monkeypatch.setattr(shipped.sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(shipped.site, "getuserbase", lambda: str(tmp_path / "user"))
    page = tmp_path / place / "share" / "lcp_plugin" / "docs" / "files.md"
    assert shipped.locate(Page.MERGING) == Page.MERGING  # nowhere
    page.parent.mkdir(parents=True)
    page.write_text("# Files\n", encoding="utf-8")
    assert shipped.locate(Page.MERGING) == f"{page}#merging"
    assert page.parents[1] / "configs" in [f / "configs" for f in shipped.shipped_folders()]
