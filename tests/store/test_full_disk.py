"""A disk that is full while a run trains: one line, and the same command goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lcp_plugin.cli import main
from lcp_plugin.formats.identity import file_model_hash

FULL = Path("/dev/full")  # takes nothing: every write says that there is no space


@pytest.mark.skipif(not FULL.exists(), reason="a device of Linux")
def test_a_log_on_a_full_disk_is_one_line_and_the_run_goes_on(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "out" / "run" / "logs" / "steps.jsonl"
    log.parent.mkdir(parents=True)
    log.symlink_to(FULL)
    config = write_config("run", tasks=(0,))
    assert main(["--config", str(config)]) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.count("error: ") == 1
    assert "steps.jsonl could not be written (No space left on device)" in told
    log.unlink()
    assert main(["--config", str(config)]) == 0
    assert main(["--config", str(write_config("whole", tasks=(0,)))]) == 0
    hashes = [file_model_hash(tmp_path / "out" / f"{n}.safetensors") for n in ("run", "whole")]
    assert hashes[0] == hashes[1]
