"""A LoRA of another base than the run's is refused by what headers say, before a model loads."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from lora_samples import TEXT_2, Q, factors
from toy_runs import draw_two, write_run

from lcp_plugin.adapter import Adapter
from lcp_plugin.commands.front import main
from lcp_plugin.formats.keys import checkpoint_slot
from lcp_plugin.formats.lora_file import write_lora
from lcp_plugin.formats.tensors import read_header, write_tensors
from lcp_plugin.tiny import model_dir

Q_SDXL, TEXT_SDXL = (640, 640), (5120, 1280)  # (out, in) on SDXL
GIVEN = ("prev", "network_weights", "base_weights")
DIGITS = re.compile(r"\d+ x \d+")


def shape_in(base: Path, module: str) -> tuple[int, int]:
    """(out, in) of a linear layer in a diffusers folder."""
    folder, _, rest = module.partition(".")
    (file,) = (base / folder).glob("*.safetensors")
    names = (f"{rest}.weight", f"{rest.removeprefix('text_model.')}.weight")
    tensors = read_header(file).tensors
    out, inputs = next(tensors[name].shape for name in names if name in tensors)
    return out, inputs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, toy_base: Path) -> Path:
    """LoRAs of SDXL's widths, of tiny-sdxl's and of the toy's, a checkpoint, pictures, a config."""
    folder = tmp_path_factory.mktemp("widths")
    draw_two(folder)
    write_run(folder, toy_base, folder, "run", (0,))
    tiny, toy = shape_in(model_dir(), Q), shape_in(toy_base, Q)
    for name, module, shape in (
        ("sdxl", Q, Q_SDXL),
        ("text", TEXT_2, TEXT_SDXL),
        ("tiny", Q, tiny),
        ("toy", Q, toy),
    ):
        factor = factors(shape, 2, 2.0, 0)
        write_lora(folder / f"{name}.safetensors", Adapter({module: factor}))
    write_tensors(folder / "checkpoint.safetensors", checkpoint_of(toy))
    return folder


def checkpoint_of(q: tuple[int, int]) -> Mapping[str, torch.Tensor]:
    """What headers need of a single file: its two text encoders, one query, one q, k, v."""
    marks = ("conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x")
    joint, _ = checkpoint_slot(TEXT_2.replace("mlp.fc1", "self_attn.k_proj"))
    tensors = {mark: torch.zeros(1) for mark in marks}
    return {**tensors, checkpoint_slot(Q)[0]: torch.zeros(q), joint: torch.zeros(48, 16)}


def refuse(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one error line of a command that fails."""
    capsys.readouterr()
    assert main(argv) != 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


@pytest.fixture
def dry_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """dry_run(base, prev=...) -> the command line; nothing may load a model."""
    from lcp_plugin.sdxl import load

    monkeypatch.setattr(load, "_read_pipeline", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.chdir(place)

    def line(base: str | Path, **given: str) -> list[str]:
        options = [word for key, value in given.items() for word in (f"--{key}", value)]
        named = ["--pretrained_model_name_or_path", str(base)]
        return ["train", "--config", "run.toml", *named, *options, "--dry_run"]

    return line


@pytest.mark.parametrize("option", GIVEN)
@pytest.mark.parametrize("kind", ["tiny", "folder", "file"])
def test_a_dry_run_refuses_a_lora_of_other_widths(
    dry_run: Callable[..., list[str]],
    place: Path,
    toy_base: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    kind: str,
) -> None:
    bases = {"tiny": "tiny-sdxl", "folder": toy_base, "file": place / "checkpoint.safetensors"}
    theirs = shape_in(model_dir() if kind == "tiny" else toy_base, Q)
    told = refuse(capsys, dry_run(bases[kind], **{option: "sdxl.safetensors"}))
    assert Q in told
    assert DIGITS.findall(told) == ["640 x 640", f"{theirs[0]} x {theirs[1]}"]
    other = "tiny.safetensors" if kind != "tiny" else "toy.safetensors"
    assert "made for another base" in refuse(capsys, dry_run(bases[kind], **{option: other}))


def test_text_encoders_are_compared_too(
    dry_run: Callable[..., list[str]], toy_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert TEXT_2 in refuse(capsys, dry_run(toy_base, prev="text.safetensors"))


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("option", GIVEN)
def test_a_lora_that_fits_passes_the_dry_run(
    dry_run: Callable[..., list[str]], place: Path, toy_base: Path, kind: str, option: str
) -> None:
    base = toy_base if kind == "folder" else place / "checkpoint.safetensors"
    assert main(dry_run(base, **{option: "toy.safetensors"})) == 0


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
def test_q_k_and_v_of_a_single_file_are_thirds_of_one_tensor(
    dry_run: Callable[..., list[str]],
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
) -> None:
    module = TEXT_2.replace("mlp.fc1", f"self_attn.{part}")
    lora, base = tmp_path / "x.safetensors", place / "checkpoint.safetensors"
    write_lora(lora, Adapter({module: factors((16, 16), 2, 2.0, 0)}))
    assert main(dry_run(base, prev=str(lora))) == 0
    write_lora(lora, Adapter({module: factors((48, 16), 2, 2.0, 0)}))
    assert "has 16 x 16" in refuse(capsys, dry_run(base, prev=str(lora)))


def test_a_run_an_evaluation_and_a_rehearsal_refuse_it_as_early(
    dry_run: Callable[..., list[str]], toy_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, base = "sdxl.safetensors", ["--base", str(toy_base)]
    train = dry_run(toy_base, prev=lora)[:-1]
    evaluate = ["evaluate", "--adapters", lora, "--tasks", "run.toml", *base]
    for argv in (train, evaluate, ["rehearse", lora, "--prompts", "a disc", *base]):
        assert "640 x 640; base" in refuse(capsys, argv)


def test_without_the_base_a_dry_run_still_reads_what_is_given(
    dry_run: Callable[..., list[str]], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "cut.safetensors").write_bytes((place / "toy.safetensors").read_bytes()[:-9])
    hub = "some/base-that-is-not-here"
    for option in GIVEN:
        assert "cut.safetensors" in refuse(capsys, dry_run(hub, **{option: "cut.safetensors"}))
    assert "nowhere" in refuse(capsys, dry_run(hub, prev="nowhere.safetensors"))
    assert main(dry_run(hub, prev="toy.safetensors")) == 0


def test_a_bias_of_another_length_is_refused(
    dry_run: Callable[..., list[str]],
    toy_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lcp_plugin.biases import Biases

    out = Q.replace("to_q", "to_out.0")
    shape = shape_in(toy_base, out)
    fit = Adapter({out: factors(shape, 2, 2.0, 0)})
    path = tmp_path / "bias.safetensors"
    write_lora(path, fit, biases=Biases({out: torch.ones(shape[0])}))
    assert main(dry_run(toy_base, prev=str(path))) == 0
    conv = "unet.conv_in"
    write_lora(path, fit, biases=Biases({conv: torch.ones(7)}))
    told = refuse(capsys, dry_run(toy_base, prev=str(path)))
    assert f"the bias of {conv} in 7 places; base" in told


def test_weights_in_several_files_and_variants_are_all_read(
    dry_run: Callable[..., list[str]],
    toy_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lcp_plugin.formats.tensors import read_tensors

    base = tmp_path / "base"
    shutil.copytree(toy_base, base)
    (whole,) = (base / "unet").glob("*.safetensors")
    tensors = read_tensors(whole)
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = base / "unet" / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        write_tensors(file, {name: tensors[name] for name in part})
    whole.unlink()
    assert main(dry_run(base, prev="toy.safetensors")) == 0
    assert "640 x 640" in refuse(capsys, dry_run(base, prev="sdxl.safetensors"))
