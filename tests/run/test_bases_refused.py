"""Bases that nothing can start on, by each command that names one: a line before a model loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_samples import Q, factors
from toy_runs import draw_two, write_run

from lcp_plugin.adapter import Adapter
from lcp_plugin.commands.front import main
from lcp_plugin.formats.lora_file import write_lora
from lcp_plugin.formats.tensors import read_tensors, write_tensors

Damage = Callable[[Path], None]
UNET = "unet/diffusion_pytorch_model.safetensors"


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def take_nine_channels(base: Path) -> None:
    """What an inpainting UNet is."""
    config = base / "unet" / "config.json"
    write_text(config, json.dumps({**json.loads(config.read_text("utf-8")), "in_channels": 9}))
    tensors = read_tensors(base / UNET)
    first = tensors["conv_in.weight"]
    tensors["conv_in.weight"] = torch.cat([first, first.new_zeros(len(first), 5, 3, 3)], 1)
    write_tensors(base / UNET, tensors, {"format": "pt"})


def empty_tokenizer(base: Path) -> None:
    for file in (base / "tokenizer_2").iterdir():
        file.unlink()


def keep_a_pickle(base: Path) -> None:
    (base / UNET).rename(base / UNET.replace(".safetensors", ".bin"))


REFUSED: dict[str, tuple[Damage, str]] = {
    "tokenizer_2": (lambda b: shutil.rmtree(b / "tokenizer_2"), "no folder tokenizer_2"),
    "tokenizer": (empty_tokenizer, "no vocab.json and no merges.txt in tokenizer_2"),
    "text_encoder_2": (lambda b: shutil.rmtree(b / "text_encoder_2"), "text_encoder_2/config.json"),
    "vae": (lambda b: shutil.rmtree(b / "vae"), "no vae/config.json"),
    "scheduler": (lambda b: shutil.rmtree(b / "scheduler"), "scheduler/scheduler_config.json"),
    "pickle": (keep_a_pickle, "no .safetensors weights in unet"),
    "list": (lambda b: write_text(b / "model_index.json", "[1]"), "model_index.json holds no"),
    "cut": (lambda b: write_text(b / "unet" / "config.json", "{"), "damaged: unet/config.json"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, toy_base: Path) -> Path:
    """A folder with pictures, a LoRA of the toy, and a list of tasks."""
    folder = tmp_path_factory.mktemp("refused")
    draw_two(folder)
    write_run(folder, toy_base, folder, "run", (0,))
    q = read_tensors(toy_base / UNET)[f"{Q.removeprefix('unet.')}.weight"]
    shape = (int(q.shape[0]), int(q.shape[1]))
    write_lora(folder / "some.safetensors", Adapter({Q: factors(shape, 2, 2.0, 0)}), {})
    return folder


def commands(place: Path, base: Path) -> dict[str, list[str]]:
    """A command line of each verb that takes a base."""
    named, lora = ["--base", str(base)], str(place / "some.safetensors")
    config = ["--config", str(place / "run.toml"), "--pretrained_model_name_or_path", str(base)]
    draw = ["--images", "1", "--steps", "1"]
    tasks = ["--tasks", str(place / "run.toml")]
    return {
        "dry run": ["train", *config, "--dry_run"],
        "train": ["train", *config],
        "evaluate": ["evaluate", "--adapters", lora, *tasks, *named, *draw],
        "rehearse": ["rehearse", lora, "--prompts", "a disc", *named, *draw],
        "export": ["export", lora, "--as", "checkpoint", "-o", str(base) + "_fused", *named],
        "merge": ["merge", lora, "--quiet", "-o", str(base) + "_fused", *named],
    }


def complain(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one error line of a command that fails."""
    capsys.readouterr()
    assert main(argv) != 0
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_base_of_which_a_part_is_missing_is_refused_by_every_command(
    place: Path,
    toy_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    from lcp_plugin.sdxl import load

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "_read_pipeline", lambda *a: pytest.fail("a model was loaded"))
    damage, words = REFUSED[kind]
    base = tmp_path / "base"
    shutil.copytree(toy_base, base)
    damage(base)
    for argv in commands(place, base).values():
        assert words in complain(capsys, argv)
    assert not (tmp_path / "base_fused").exists()


def test_an_inpainting_base_is_not_trained_on_but_fused_into(
    place: Path,
    toy_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    shutil.copytree(toy_base, base)
    take_nine_channels(base)
    lines = commands(place, base)
    for verb in ("dry run", "train", "evaluate", "rehearse"):
        assert "takes 9 channels (an inpainting UNet)" in complain(capsys, lines[verb])
    assert main(lines["merge"]) == 0
    fused = read_tensors(tmp_path / "base_fused" / UNET)
    assert fused["conv_in.weight"].shape[1] == 9


def test_a_single_inpainting_file_is_refused_before_it_is_loaded(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x")
    entry = "model.diffusion_model.input_blocks.0.0.weight"
    tensors = {**{key: torch.zeros(1) for key in keys}, entry: torch.zeros(2, 9, 3, 3)}
    write_tensors(tmp_path / "inpaint.safetensors", tensors)
    line = commands(place, tmp_path / "inpaint.safetensors")["dry run"]
    assert "inpaint.safetensors' takes 9 channels" in complain(capsys, line)


@pytest.mark.parametrize("parts", [("unet", "vae", "text_encoder", "text_encoder_2"), ("vae",)])
def test_weights_that_are_there_as_a_variant_only_are_loaded(
    toy_base: Path, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    from lcp_plugin.sdxl.load import load_pipeline

    base = tmp_path / "base"
    shutil.copytree(toy_base, base)
    for part in parts:
        for file in list((base / part).glob("*.safetensors")):
            file.rename(file.with_suffix(".fp16.safetensors"))
    got, wanted = load_pipeline(str(base)), load_pipeline(str(toy_base))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        theirs = getattr(wanted, part).state_dict()
        assert all(torch.equal(t, theirs[n]) for n, t in getattr(got, part).state_dict().items())
