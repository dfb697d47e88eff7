"""Images: upright, RGB, on white; and what happens to unreadable ones."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lcp_plugin.data.images import (
    change_colours,
    open_alpha,
    open_mask,
    resize,
    to_tensor,
)
from lcp_plugin.errors import DataError
from lcp_plugin.formats.pictures import open_rgb, read_size


def test_a_photo_taken_sideways_stands_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste((0, 0, 255), (0, 0, 20, 20))  # blue at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    upright = open_rgb(tmp_path / "a.png")
    assert upright.size == read_size(tmp_path / "a.png") == (20, 40)
    assert upright.getpixel((10, 5)) == (0, 0, 255)  # left has become the top


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.putpixel((0, 0), (10, 20, 30, 255))
    picture.save(tmp_path / "a.png")
    opened = open_rgb(tmp_path / "a.png")
    assert opened.mode == "RGB"
    assert opened.getpixel((0, 0)) == (10, 20, 30)
    assert opened.getpixel((3, 3)) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour_lies_on_white_too(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([0, 0, 0, 200, 100, 50] + [0] * 762)
    picture.putpixel((0, 0), 1)
    picture.save(tmp_path / "a.png", transparency=0)
    opened = open_rgb(tmp_path / "a.png")
    assert opened.getpixel((0, 0)) == (200, 100, 50)
    assert opened.getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "LA"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    name = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (4, 4), "white").convert(mode).save(name)
    assert open_rgb(name).mode == "RGB"
    assert open_rgb(name).getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.full((4, 4), 257 * 100, dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert open_rgb(tmp_path / "a.png").getpixel((0, 0)) == (100, 100, 100)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        open_rgb(tmp_path / "broken.png")
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        read_size(tmp_path / "broken.png")


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jpg cannot be read"):
        open_rgb(tmp_path / "cut.jpg")


def test_pixels_run_from_minus_one_to_one() -> None:
    picture = Image.new("RGB", (2, 1), (0, 0, 0))
    picture.putpixel((1, 0), (255, 255, 255))
    tensor = to_tensor(picture)
    assert tensor.shape == (3, 1, 2)
    assert torch.equal(tensor[:, 0, 0], -torch.ones(3))
    assert torch.equal(tensor[:, 0, 1], torch.ones(3))


def test_shrinking_averages_areas() -> None:
    values = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    picture = Image.fromarray(values).convert("RGB")
    expected = values.reshape(2, 2, 2, 2).mean(axis=(1, 3)).round()
    ours = np.asarray(resize(picture, (2, 2)))[..., 0]
    assert np.abs(ours - expected).max() <= 1


def test_alpha_and_masks_are_read_apart(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (2, 1), (9, 9, 9, 255))
    picture.putpixel((1, 0), (9, 9, 9, 51))
    picture.save(tmp_path / "a.png")
    alpha = open_alpha(tmp_path / "a.png")
    assert alpha is not None
    assert np.asarray(alpha).tolist() == [[255, 51]]
    Image.new("RGB", (2, 1), (128, 0, 0)).save(tmp_path / "m.png")
    assert open_alpha(tmp_path / "m.png") is None
    assert np.asarray(open_mask(tmp_path / "m.png")).tolist() == [[128, 128]]


def test_colours_change_a_little_and_repeatably() -> None:
    picture = Image.new("RGB", (4, 4), (200, 80, 40))
    seen = set()
    for seed in range(20):
        ours = change_colours(picture, random.Random(seed))
        assert ours.tobytes() == change_colours(picture, random.Random(seed)).tobytes()
        pixel = ours.getpixel((0, 0))
        assert isinstance(pixel, tuple)
        seen.add(pixel)
        assert max(abs(a - b) for a, b in zip(pixel, (200, 80, 40), strict=True)) < 60
    assert len(seen) > 5
