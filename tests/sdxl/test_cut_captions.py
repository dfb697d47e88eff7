"""Captions longer than the text encoders take: how many, and which option helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lora_samples import build_uneven_toy

from lcp_plugin.cli import main
from lcp_plugin.delivery.single_file import write_single_file


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


@pytest.fixture
def dry_run(
    write_config: Callable[..., Path], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """dry_run(words, **options): the lines on what is cut, with a caption of so many words."""

    def run(words: int, **options: object) -> list[str]:
        (pictures / "disc0" / "01.txt").write_text(" ".join(["red"] * words), encoding="utf-8")
        config = write_config("run", tasks=(0,), caption_extension=".txt", **options)
        assert main(["--config", str(config), "--dry_run"]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "cut there" in line]

    return run


@pytest.mark.parametrize("beside", [True, False])
def test_captions_over_a_single_file_are_counted_before_it_is_loaded(
    dry_run: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    beside: bool,
) -> None:
    monkeypatch.delenv("LCP_SDXL_CONFIG", raising=False)
    folder = tmp_path / "folder"
    build_uneven_toy().save_pretrained(str(folder))
    write_single_file(folder, tmp_path / "one.safetensors")
    if beside:
        folder.rename(tmp_path / "one_config")
    base = {"pretrained_model_name_or_path": str(tmp_path / "one.safetensors")}
    assert dry_run(60, **base) == []
    (line,) = dry_run(100, **base)
    assert "max_token_length = 150" in line
    assert ("Counted by words" in line) is not beside


def test_prompts_of_samples_and_of_evaluation_that_are_cut_are_counted(
    dry_run: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text(" ".join(["red"] * 80) + " --s 2\na toy\n")
    prompts = str(tmp_path / "p.txt")
    (line,) = dry_run(10, sample_prompts=prompts)
    assert "sample_prompts: 1 of 2 prompts is longer than 75 tokens (up to 80)" in line
    assert "max_token_length = 150 keeps them whole" in line
    assert dry_run(10, sample_prompts=prompts, max_token_length=150) == []


def test_evaluation_prompts_that_are_cut_are_counted(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config("run", tasks=(0,))
    long = " ".join(["red"] * 90)
    text = config.read_text(encoding="utf-8")
    config.write_text(text + f'\neval_prompts = ["a disc", "{long}"]\n', encoding="utf-8")
    for flags in ((), ("--dry_run",)):
        assert main(["--config", str(config), "--overwrite", *flags]) == 0
        told = capsys.readouterr()
        assert "1 of 2 evaluation prompts is longer than 75 tokens" in told.out + told.err
        assert "max_token_length = 150 keeps them whole" in told.out + told.err
    whole = ("--max_token_length", "150", "--dry_run")
    assert main(["--config", str(config), "--overwrite", *whole]) == 0
    assert "evaluation prompts" not in capsys.readouterr().out
