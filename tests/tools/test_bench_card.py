"""The bench of a card without one: what it refuses, and what it measures unless told."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.card_command import list_default
from benchmarks.command import run_command

from lcp_plugin.errors import ConfigError, LcpError


def test_sd_scripts_is_measured_where_a_checkout_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SD_SCRIPTS", raising=False)
    assert "sd_scripts" not in list_default()
    monkeypatch.setenv("SD_SCRIPTS", str(tmp_path))
    assert "sd_scripts" in list_default()


def test_a_folder_that_is_no_checkout_is_named_and_the_other_rows_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SD_SCRIPTS", str(tmp_path))
    target = tmp_path / "rows.jsonl"
    chosen = ["--only", "sd_scripts", "boundary", "--json", str(target)]
    with pytest.raises(LcpError, match="1 measurement failed"):
        run_command(["--size", "tiny", "--device", "cpu", *chosen])
    lines = target.read_text(encoding="utf-8").splitlines()
    assert "set it to a checkout of kohya-ss/sd-scripts" in lines[0]
    assert any("boundary of naive" in line for line in lines[1:])


def test_an_unknown_measurement_of_a_card_is_refused() -> None:
    with pytest.raises(ConfigError, match="--only nonsense: with --device there are step"):
        run_command(["--size", "tiny", "--device", "cpu", "--only", "nonsense"])
