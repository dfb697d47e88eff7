"""Encoders built from their configs with random weights, so that the real loading code runs."""

import json
import shutil

import pytest
import torch
from quick_scores import photo
from torch.nn.functional import layer_norm, multi_head_attention_forward, normalize

from lcp_plugin.errors import ConfigError, FileFormatError
from lcp_plugin.evaluation.checkpoints import read_checkpoint
from lcp_plugin.evaluation.images import preprocess
from lcp_plugin.evaluation.metrics import (
    METRICS,
    NETWORKS,
    choose_metrics,
    find_weights,
    load_encoder,
    parse_encoder_paths,
)
from lcp_plugin.evaluation.networks import rename_openai_tower
from lcp_plugin.formats.identity import hash_file

VISION = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "patch_size": 16}


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
