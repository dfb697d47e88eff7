"""Pictures as encoders see them: sizes, turns, modes, and the hash of what is seen."""

import numpy as np
import pytest
from PIL import Image
from quick_scores import photo

from lcp_plugin.errors import DataError
from lcp_plugin.evaluation.images import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    hash_image,
    preprocess,
    require_images,
)
from lcp_plugin.formats.pictures import open_rgb, to_rgb


def test_preprocessing_equals_transformers_own_clip_processor_to_the_pixel():
    from transformers import CLIPImageProcessorPil

    how = Preprocessing(224, 224, CLIP_MEAN, CLIP_STD, crop="transformers")
    for size in ((90, 61), (61, 90), (300, 227), (48, 48)):
        image = photo(*size)
        wanted = CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(preprocess(image, how).numpy(), wanted, atol=2e-6)


def test_dino_preprocessing_equals_a_reference_written_with_pil():
    image = photo(301, 200)
    resized = image.resize((int(256 * 301 / 200), 256), Image.Resampling.BICUBIC)
    left = round((resized.width - 224) / 2)
    pixels = np.asarray(resized.crop((left, 16, left + 224, 240)), np.float64) / 255
    wanted = ((pixels - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)
    how = Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD)
    np.testing.assert_allclose(preprocess(image, how).numpy(), wanted, atol=1e-6)


def test_exif_orientation_is_applied(tmp_path):
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    upright = open_rgb(tmp_path / "turned.png")
    assert upright.size == (61, 90)
    assert hash_image(upright) == hash_image(image.transpose(Image.Transpose.ROTATE_270))


def test_modes_other_than_rgb_become_what_a_viewer_shows():
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((2, 2), 65535, dtype=np.uint16))
    assert to_rgb(deep).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)
    palette = photo().quantize(16)
    palette.info["transparency"] = 0
    assert to_rgb(palette).mode == "RGB"


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    with pytest.raises(DataError, match=r"broken\.png"):
        open_rgb(tmp_path / "broken.png")
    with pytest.raises(DataError, match="not a folder"):
        require_images(tmp_path / "nowhere")


def test_the_hash_belongs_to_the_picture_not_to_its_file(tmp_path):
    photo().save(tmp_path / "a.png")
    photo().save(tmp_path / "b.bmp")
    hashes = {hash_image(open_rgb(p)) for p in require_images(tmp_path)}
    assert len(hashes) == 1
    assert hash_image(photo(seed=1)) not in hashes
