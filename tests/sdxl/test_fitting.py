"""Images where memory is short: halved batches and tiles, in training runs and in samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from lcp_plugin.sdxl import fitting
from lcp_plugin.sdxl.drawing import decode_latents
from lcp_plugin.sdxl.load import load_pipeline

FULL = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    fitting._fitted.clear()
    yield
    fitting._fitted.clear()


def shorten(monkeypatch: pytest.MonkeyPatch, kind: type, method: str, most: float) -> list[int]:
    """Lets a method take `most` numbers at a time; the sizes of the batches that it was given."""
    whole: Callable[..., Any] = getattr(kind, method)
    seen: list[int] = []

    def limited(self: Any, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(first))
        if first.numel() > most:
            raise FULL
        return whole(self, first, *args, **kwargs)

    monkeypatch.setattr(kind, method, limited)
    return seen


def images_of(run: Any) -> dict[str, Any]:
    folder = Path(run.output_dir) / "samples" / "00_base"
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob("*.png"))}


def test_a_run_samples_and_encodes_in_the_batches_that_fit(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"samples_per_task": 3, "sample_steps": 2, "vae_batch_size": 3, "max_train_steps": 1}
    whole = train("whole", **settings)
    fitting._fitted.clear()
    pixels, latent = 3 * 32 * 32, 4 * 8 * 8
    drawn = shorten(monkeypatch, UNet2DConditionModel, "forward", 2 * 2 * latent)  # with guidance
    encoded = shorten(monkeypatch, AutoencoderKL, "encode", pixels)
    decoded = shorten(monkeypatch, AutoencoderKL, "decode", 2 * latent)
    short = train("short", **settings)
    assert max(drawn) > 4 >= drawn[-1]
    assert encoded[:3] == [3, 2, 1]
    assert decoded[:3] == [6, 3, 2]
    assert set(decoded[3:]) <= {1, 2}
    first, second = images_of(whole), images_of(short)
    assert first.keys() == second.keys()
    assert len(first) == 6  # three of each task
    for name in first:
        assert np.abs(first[name] - second[name]).max() <= 1  # another cut, another last bit


def test_the_same_shortage_gives_the_same_pixels(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, UNet2DConditionModel, "forward", 2 * 2 * 4 * 8 * 8)
    settings = {"samples_per_task": 3, "sample_steps": 2, "max_train_steps": 1}
    runs = []
    for name in ("one", "two"):
        fitting._fitted.clear()
        runs.append(images_of(train(name, **settings)))
    for name, image in runs[0].items():
        assert np.array_equal(image, runs[1][name])


def test_one_image_too_large_for_memory_is_decoded_in_tiles(
    toy_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline(str(toy_base))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 64, 64, generator=generator)
    (whole,) = decode_latents(pipeline, latents)
    decoder: Callable[..., Any] = pipeline.vae.decoder.forward
    sides: list[int] = []

    def limited(sample: Tensor, *args: Any) -> Any:
        sides.append(sample.shape[-1])
        if sample.shape[-1] > 16:
            raise FULL
        return decoder(sample, *args)

    monkeypatch.setattr(pipeline.vae.decoder, "forward", limited)
    (tiled,) = decode_latents(pipeline, latents)
    assert sides[:3] == [64, 32, 16]
    assert not pipeline.vae.use_tiling  # as it was
    sides.clear()
    decode_latents(pipeline, latents)
    assert max(sides) == 16  # what did not fit is not tried again
    difference = np.asarray(whole).astype(int) - np.asarray(tiled).astype(int)
    assert tiled.size == whole.size
    assert np.abs(difference).mean() < 8  # of 255: attention and norms see a tile, not the whole


def test_what_fits_in_no_way_is_told(toy_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load_pipeline(str(toy_base))
    shorten(monkeypatch, AutoencoderKL, "decode", 0)
    with pytest.raises(torch.OutOfMemoryError):
        decode_latents(pipeline, torch.zeros(2, 4, 8, 8))
