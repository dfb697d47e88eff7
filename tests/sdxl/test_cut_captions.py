"""Captions longer than the text encoders take: how many, and which option helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lcp_plugin.cli import main


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
@pytest.mark.parametrize(
    ("words", "given", "wanted"),
    [
        (70, {}, ""),
        (100, {}, "max_token_length = 150"),
        (160, {}, "max_token_length = 225"),
        (100, {"max_token_length": 150}, ""),
        (300, {"max_token_length": 225}, "shorten them"),
    ],
)
def test_captions_that_are_cut_are_counted(
    write_config: Callable[..., Path],
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    words: int,
    given: dict[str, int],
    wanted: str,
) -> None:
    caption = " ".join(["red"] * words)
    (pictures / "disc0" / "01.txt").write_text(caption, encoding="utf-8")
    more = {"caption_extension": ".txt", "max_train_steps": 1, **given}
    config = write_config("run", tasks=(0,), **more)
    assert main(["--config", str(config), *flags]) == 0
    captured = capsys.readouterr()
    told = [x for x in (captured.out + captured.err).splitlines() if "tokens" in x and "cut" in x]
    assert len(told) == bool(wanted)
    if wanted:
        assert "1 of 2 different captions is longer" in told[0]
        assert f"up to {words}" in told[0]
        assert wanted in told[0]
