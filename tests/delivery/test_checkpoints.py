"""Whole checkpoints with an update fused in, read back by diffusers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import TEXT_2, Q, factors, fused, image

from lcp_plugin.adapter import Adapter
from lcp_plugin.biases import Change
from lcp_plugin.delivery.checkpoint import export_checkpoint
from lcp_plugin.delivery.fusing import Place, fuse_file
from lcp_plugin.delivery.learned import Learned, read_learned
from lcp_plugin.delivery.single_file import write_single_file
from lcp_plugin.delta import Delta, Dense
from lcp_plugin.errors import BaseModelError, DiskError, LineageError
from lcp_plugin.formats.lora_file import write_lora
from lcp_plugin.formats.tensors import read_header, read_tensors, write_tensors


def test_a_single_file_of_a_folder_is_read_by_diffusers_as_the_same_model(
    base: tuple[Any, Path, Path],
) -> None:
    from lcp_plugin.sdxl.load import load_pipeline

    pipeline, folder, file = base
    loaded = load_pipeline(str(file), config=str(folder))
    assert (image(loaded) - image(pipeline)).abs().max() < 1e-4


def test_a_fused_checkpoint_gives_the_images_of_the_fused_model(
    tmp_path: Path, base: tuple[Any, Path, Path], learned: Learned
) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline, folder, file = base
    done = export_checkpoint(learned, file, tmp_path / "fused.safetensors")
    loaded = StableDiffusionXLPipeline.from_single_file(str(done.path), config=str(folder))
    wanted = image(fused(pipeline, learned.delta))
    assert (wanted - image(pipeline)).abs().max() > 0.05
    assert (image(loaded) - wanted).abs().max() < 1e-4
    assert done.modules == len(learned.adapter)
    assert done.rounding_share < 1e-6


def test_a_fused_folder_gives_the_images_of_the_fused_model(
    tmp_path: Path, base: tuple[Any, Path, Path], learned: Learned
) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline, folder, _ = base
    done = export_checkpoint(learned, folder, tmp_path / "fused")
    loaded = StableDiffusionXLPipeline.from_pretrained(str(done.path))
    assert (image(loaded) - image(fused(pipeline, learned.delta))).abs().max() < 1e-4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fused"]


def test_a_checkpoint_holds_the_base_weights_that_the_run_was_trained_on(
    tmp_path: Path, toy_base: Path, train: Callable[..., Any]
) -> None:
    style = Adapter({Q: factors((32, 32), 2, 2.0, 5, size=0.1)})
    write_lora(tmp_path / "style.safetensors", style)
    given = {"base_weights": [str(tmp_path / "style.safetensors")], "base_weights_multiplier": 0.5}
    run = train("run", tasks=(0,), **given)
    learned = read_learned(run.store.root)
    export_checkpoint(learned, toy_base, tmp_path / "fused")
    weights = "unet/diffusion_pytorch_model.safetensors"
    before, after = (read_tensors(p / weights) for p in (toy_base, tmp_path / "fused"))
    name = Q.removeprefix("unet.") + ".weight"
    own = learned.delta[Q].dense() if Q in learned.delta else torch.zeros(32, 32)
    wanted = before[name].float() + 0.5 * style[Q].update() + own
    assert torch.allclose(after[name].float(), wanted, atol=2e-3)  # the base is in fp16
    assert not torch.allclose(after[name].float(), before[name].float() + own, atol=2e-3)
    (tmp_path / "style.safetensors").unlink()
    with pytest.raises(LineageError, match="base_weights .* are gone"):
        export_checkpoint(learned, toy_base, tmp_path / "again")


def test_names_order_types_metadata_and_all_other_tensors_of_a_checkpoint_stay(
    tmp_path: Path, base: tuple[Any, Path, Path]
) -> None:
    _, _, file = base
    tensors = {
        k: (v.half() if "diffusion" in k else v.bfloat16()) for k, v in read_tensors(file).items()
    }
    write_tensors(tmp_path / "half.safetensors", tensors, {"modelspec.title": "mine", "x": "y"})
    adapter = Adapter({Q: factors((32, 32), 2, 2.0, 0, size=0.1)})
    done = export_checkpoint(
        Learned(adapter, {}), tmp_path / "half.safetensors", tmp_path / "out.safetensors"
    )
    before = read_header(tmp_path / "half.safetensors")
    after = read_header(tmp_path / "out.safetensors")
    assert before == after
    assert list(before.tensors) == list(after.tensors)
    new = read_tensors(tmp_path / "out.safetensors")
    changed = [k for k in tensors if not torch.equal(tensors[k], new[k])]
    assert len(changed) == 1
    wanted = (tensors[changed[0]].float() + adapter[Q].update()).half()
    assert torch.equal(new[changed[0]], wanted)
    assert 0 < done.rounding_share < 0.05


def test_the_rounding_share_is_what_is_lost(tmp_path: Path) -> None:
    # W = 1 in bf16 (spacing 2^-7 above 1): D = 2^-8 rounds to even, back to 1: all is lost
    write_tensors(tmp_path / "w", {"w": torch.ones(4, 4, dtype=torch.bfloat16)})
    delta = Delta({Q: Dense(torch.full((4, 4), 2.0**-8))})
    found = fuse_file(tmp_path / "w", tmp_path / "o", {"w": [Place(Q)]}, Change(delta))
    assert found.rounding_share == pytest.approx(1.0)
    delta = Delta({Q: Dense(torch.full((4, 4), 2.0**-6))})
    found = fuse_file(tmp_path / "w", tmp_path / "o", {"w": [Place(Q)]}, Change(delta))
    assert found.rounding_share == 0.0


def test_a_third_of_a_stacked_tensor_is_changed_and_no_more(tmp_path: Path) -> None:
    whole = torch.randn(9, 4)
    write_tensors(tmp_path / "w", {"in_proj": whole, "last": torch.tensor([7.0])})
    delta = Delta({TEXT_2: Dense(torch.ones(3, 4))})
    fuse_file(tmp_path / "w", tmp_path / "o", {"in_proj": [Place(TEXT_2, 1)]}, Change(delta))
    new = read_tensors(tmp_path / "o")
    assert torch.equal(new["in_proj"][3:6], whole[3:6] + 1)
    assert torch.equal(new["in_proj"][[0, 1, 2, 6, 7, 8]], whole[[0, 1, 2, 6, 7, 8]])
    assert new["last"].item() == 7.0


def test_a_base_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, base: tuple[Any, Path, Path]
) -> None:
    _, folder, file = base
    other = Learned(Adapter({Q: factors((8, 6), 2, 2.0, 0)}), {})
    lacking = Learned(Adapter({Q.replace("blocks.1", "blocks.7"): factors((8, 6), 2, 2.0, 0)}), {})
    for target, where in ((tmp_path / "a.safetensors", file), (tmp_path / "a", folder)):
        with pytest.raises(BaseModelError, match="another base"):
            export_checkpoint(other, where, target)
        with pytest.raises(BaseModelError, match="lacks"):
            export_checkpoint(lacking, where, target)
    assert list(tmp_path.iterdir()) == []


def test_text_encoders_of_one_width_make_no_single_file(tmp_path: Path) -> None:
    from lcp_plugin.tiny.architecture import build_toy

    build_toy().save_pretrained(str(tmp_path / "toy"))
    with pytest.raises(BaseModelError, match="16 wide"):
        write_single_file(tmp_path / "toy", tmp_path / "toy.safetensors")
    assert not (tmp_path / "toy.safetensors").exists()


def test_an_existing_folder_is_not_overwritten(
    tmp_path: Path, base: tuple[Any, Path, Path], learned: Learned
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"x")
    with pytest.raises(DiskError, match="not empty"):
        export_checkpoint(learned, base[1], tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["photo.png"]


def test_a_full_disk_leaves_no_half_checkpoint(
    tmp_path: Path,
    base: tuple[Any, Path, Path],
    learned: Learned,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "c.safetensors").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match="No space left"):
        export_checkpoint(learned, base[2], tmp_path / "c.safetensors")
    with pytest.raises(DiskError, match="No space left"):
        export_checkpoint(learned, base[1], tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    assert (tmp_path / "c.safetensors").read_bytes() == b"old"
