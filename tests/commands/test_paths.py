"""Paths that a command cannot use: one line, and the files that were there stay as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
from lora_samples import Q, factors
from toy_runs import draw_two, write_run

from lcp_plugin.adapter import Adapter
from lcp_plugin.commands.front import main
from lcp_plugin.formats.lora_file import write_lora

LONG = "x" * 300
WITH_A_PATH = (
    ["merge", LONG, "-o", "m.safetensors"],
    ["merge", "one.safetensors", "-o", f"{LONG}.safetensors"],
    ["export", LONG, "-o", "e.safetensors"],
    ["evaluate", LONG],
    ["train", "--config", LONG],
    ["train", "--config", "run.toml", "--dry_run", "--vae", LONG],
    ["train", "--config", "run.toml", "--dry_run", "--prev", LONG],
    ["train", "--config", "run.toml", "--dry_run", "--output_dir", LONG],
    ["train", "--config", "run.toml", "--dry_run", "--base_weights", LONG],
    ["train", "--config", "run.toml", "--dry_run", "--pretrained_model_name_or_path", LONG],
)


@pytest.fixture
def place(tmp_path: Path, toy_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: two LoRA files, pictures, a run's config and a plain file."""
    draw_two(tmp_path)
    write_run(tmp_path, toy_base, tmp_path, "run", (0,))
    for number, name in enumerate(("one", "two")):
        adapter = Adapter({Q: factors((32, 32), 2, 2.0, number)})
        write_lora(tmp_path / f"{name}.safetensors", adapter, {})
    (tmp_path / "afile").write_text("x", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complain(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one error line of a command that fails."""
    capsys.readouterr()
    assert main(argv) != 0
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("argv", WITH_A_PATH, ids=lambda argv: " ".join(argv).replace(LONG, "LONG"))
def test_a_name_that_no_file_can_have_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    line = complain(capsys, *argv)
    assert "xxxx" in line
    assert "File name too long" in line


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_what_is_read_is_not_written_over(
    place: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    before = (place / "one.safetensors").read_bytes()
    assert "is a file that this reads" in complain(
        capsys, verb, "one.safetensors", "-o", "./one.safetensors"
    )
    assert (place / "one.safetensors").read_bytes() == before


def test_a_chart_of_an_unknown_kind_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complain(capsys, "conflicts", "one.safetensors", "two.safetensors", "--plot", "x.xyz")
    assert "no chart is drawn as .xyz" in line


def test_a_folder_for_results_that_is_a_file_is_one_line(
    place: Path, toy_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--base", str(toy_base)]
    evaluate = ["evaluate", "--adapters", "one.safetensors", "--tasks", "run.toml", *base]
    assert "afile cannot be used" in complain(capsys, *evaluate, "--output", "afile")
    rehearse = ["rehearse", "one.safetensors", "--prompts", "a disc", *base]
    assert "afile cannot be used" in complain(capsys, *rehearse, "-o", "afile")
    assert (place / "afile").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--images", "0"], "--images"),
        (["--steps", "-1"], "--steps"),
        (["--size", "7"], "size = 7: wanted a multiple of 8"),
        (["--device", "nowhere"], "device 'nowhere' is not to be had here"),
        (["--protocol", "bad.toml"], "images = 'many': wanted a number"),
        (["--protocol", "none.toml"], "0 images"),
    ],
)
def test_an_evaluation_that_draws_nothing_is_refused(
    place: Path, toy_base: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    (place / "bad.toml").write_text('images = "many"\n', encoding="utf-8")
    (place / "none.toml").write_text("images = 0\n", encoding="utf-8")
    argv = ["--adapters", "one.safetensors", "--tasks", "run.toml", "--base", str(toy_base)]
    capsys.readouterr()
    try:
        status = main(["evaluate", *argv, *more])
    except SystemExit as left:  # argparse ends so
        status = int(left.code or 0)
    assert status != 0
    assert words in capsys.readouterr().err


def test_a_list_of_tasks_need_not_name_the_base_that_the_command_names(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (place / "run.toml").read_text(encoding="utf-8").splitlines()
    kept = [line for line in config if not line.startswith("pretrained_model_name_or_path")]
    (place / "tasks.toml").write_text("\n".join(kept), encoding="utf-8")
    argv = [
        "--adapters",
        "one.safetensors",
        "--tasks",
        "tasks.toml",
        "--base",
        "nowhere.safetensors",
    ]
    assert "'nowhere.safetensors' does not exist" in complain(capsys, "evaluate", *argv)


@pytest.mark.parametrize("key", ["network_weights", "base_weights"])
def test_a_dry_run_names_weights_of_another_model(
    place: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    text = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    write_lora(place / "sd15.safetensors", Adapter({text: factors((640, 768), 2, 2.0, 0)}), {})
    argv = ["train", "--config", "run.toml", "--dry_run", f"--{key}", "sd15.safetensors"]
    assert "sd15.safetensors is no SDXL LoRA" in complain(capsys, *argv)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("seed = {a = 1}", "seed = {'a': 1}: wanted a number"),
        ('sample_prompts = {prompt = "a"}', "sample_prompts = {'prompt': 'a'}: wanted text"),
        ('training_comment = "a\\u0000b"', "wanted text without null characters"),
    ],
)
def test_values_that_no_option_has_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], given: str, words: str
) -> None:
    lines = (place / "run.toml").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(given.split(" ")[0])]
    (place / "bad.toml").write_text("\n".join([given, *kept]), encoding="utf-8")
    assert words in complain(capsys, "train", "--config", "bad.toml", "--dry_run")


def test_an_empty_list_of_files_is_none(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "run.toml", "--dry_run", "--base_weights", ""]) == 0
