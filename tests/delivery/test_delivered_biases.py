"""Files that change biases, through merge and export: kept, weighed, fused, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import fused, image, load_tool, random_adapter, random_biases, with_biases
from safetensors.torch import load_file

from lcp_plugin.biases import Biases
from lcp_plugin.delta import Delta
from lcp_plugin.formats.lora_file import read_lora, write_lora

Given = tuple[Path, Delta, Biases]


@pytest.fixture(scope="module")
def given(base: tuple[Any, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Given:
    """A file on UNet and both text encoders that changes biases."""
    adapter = random_adapter(
        base[0], lambda n: n.endswith(("to_q", "fc1", "conv1")), lambda i: (2, 3.0)
    )
    words = ("conv1", "q_proj", "v_proj", "fc1", "ff.net.2", "conv_in", "time_emb_proj")
    biases = random_biases(base[0], lambda n: n.endswith(words))
    path = tmp_path_factory.mktemp("biases") / "a.safetensors"
    write_lora(path, adapter, biases=biases)
    return path, Delta.of(adapter), biases


def run_tool(name: str, *arguments: object) -> int:
    status: int = load_tool(name).main([str(argument) for argument in arguments])
    return status


@pytest.mark.parametrize("kind", ["folder", "single file"])
def test_a_checkpoint_holds_them(
    tmp_path: Path, base: tuple[Any, Path, Path], given: Given, kind: str
) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline, folder, file = base
    path, delta, biases = given
    source = folder if kind == "folder" else file
    target = tmp_path / ("out" if kind == "folder" else "out.safetensors")
    assert run_tool("export", path, "--as", "checkpoint", "--base", source, "-o", target) == 0
    if kind == "folder":
        loaded = StableDiffusionXLPipeline.from_pretrained(str(target))
    else:
        loaded = StableDiffusionXLPipeline.from_single_file(str(target), config=str(folder))
    without = fused(pipeline, delta)
    wanted = image(with_biases(without, biases))
    assert (wanted - image(without)).abs().max() > 0.02
    assert (image(loaded) - wanted).abs().max() < 1e-4


def test_a_checkpoint_without_such_a_bias_is_refused(
    tmp_path: Path, base: tuple[Any, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    write_lora(tmp_path / "a.safetensors", {}, biases=Biases({name: torch.ones(64)}))  # type: ignore[arg-type]
    for source in base[1:]:
        given = ("--as", "checkpoint", "--base", source, "-o", tmp_path / "o.safetensors")
        assert run_tool("export", tmp_path / "a.safetensors", *given) != 0
        (error, *_) = capsys.readouterr().err.splitlines()
        assert "to_q" in error
        assert "lacks" in error


@pytest.mark.parametrize("form", ["lora", "diff", "lora:1"])
def test_forms_of_kohyas_keys_hold_them(tmp_path: Path, given: Given, form: str) -> None:
    path, _, biases = given
    target = tmp_path / "o.safetensors"
    assert run_tool("export", path, "--as", form, "-o", target) == 0
    keys = {key: tensor for key, tensor in load_file(target).items() if key.endswith(".diff_b")}
    assert torch.equal(keys["lora_unet_input_blocks_0_0.diff_b"], biases["unet.conv_in"])
    assert len(keys) == len(biases)


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_forms_that_cannot_hold_them_are_refused(
    tmp_path: Path, given: Given, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("export", given[0], "--as", form, "-o", tmp_path / "o.safetensors") != 0
    (error, *_) = capsys.readouterr().err.splitlines()
    assert "biases change (diff_b)" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["sum", "magmax", "orthogonal", "ties"])
def test_a_merge_weighs_them_as_it_does_deltas(tmp_path: Path, given: Given, method: str) -> None:
    path, _, biases = given
    other = tmp_path / "b.safetensors"
    opposite = biases.map(lambda change: change.flip(0))
    write_lora(other, read_lora(path).adapter, biases=opposite)
    target = tmp_path / "m.safetensors"
    more = ("--method", method, "--density", 1, "--weights", 1, -0.5, "--quiet")
    assert run_tool("merge_adapters", path, other, "-o", target, *more) == 0
    got = read_lora(target).biases
    for name, change in biases.items():
        one, two = change, -0.5 * opposite[name]
        wanted = one + two
        if method == "magmax":
            wanted = torch.where(two.abs() >= one.abs(), two, one)
        if method == "ties":  # the mean of those whose sign is that of the sum
            agree = [torch.where(p.sign() == wanted.sign(), p, 0.0) for p in (one, two)]
            wanted = sum(agree) / sum((p != 0).float() for p in agree).clamp_min(1)  # type: ignore[union-attr]
        torch.testing.assert_close(got[name], wanted)


def test_conflicts_say_that_biases_are_not_compared(
    given: Given, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("conflicts", given[0], given[0]) == 0
    assert f"{len(given[2])} biases are not compared" in capsys.readouterr().out
