"""Names of modules and keys, against the names that kohya and diffusers really use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lcp_plugin.errors import FileFormatError
from lcp_plugin.formats.keys import (
    canonical,
    checkpoint_slot,
    from_sgm,
    is_module,
    kernel_of,
    kohya_name,
    to_sgm,
)
from lcp_plugin.formats.lora_keys import parse_key, write_key

BLOCK = "transformer_blocks"


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    """SDXL's UNet with its real sizes, on meta: no memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


@pytest.fixture(scope="module")
def matrices(unet: nn.Module) -> dict[str, nn.Module]:
    return {
        f"unet.{name}": module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def text_modules() -> list[str]:
    inside = [f"self_attn.{p}_proj" for p in "qkv"] + ["self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    return [
        f"{encoder}.text_model.encoder.layers.{i}.{name}"
        for encoder, layers in (("text_encoder", 12), ("text_encoder_2", 32))
        for i in range(layers)
        for name in inside
    ]


@pytest.mark.parametrize(
    ("key", "module"),
    [  # left: reference/kohya.md 3.1; right: diffusers' names of SDXL's modules
        (
            f"lora_unet_input_blocks_4_1_{BLOCK}_0_attn1_to_q.lora_down.weight",
            f"unet.down_blocks.1.attentions.0.{BLOCK}.0.attn1.to_q",
        ),
        ("lora_unet_input_blocks_4_1_proj_in.alpha", "unet.down_blocks.1.attentions.0.proj_in"),
        (
            f"lora_unet_middle_block_1_{BLOCK}_9_ff_net_0_proj.lora_up.weight",
            f"unet.mid_block.attentions.0.{BLOCK}.9.ff.net.0.proj",
        ),
        (
            f"lora_unet_output_blocks_0_1_{BLOCK}_3_attn2_to_out_0.alpha",
            f"unet.up_blocks.0.attentions.0.{BLOCK}.3.attn2.to_out.0",
        ),
        ("lora_unet_input_blocks_1_0_in_layers_2.alpha", "unet.down_blocks.0.resnets.0.conv1"),
        (
            "lora_unet_input_blocks_4_0_skip_connection.alpha",
            "unet.down_blocks.1.resnets.0.conv_shortcut",
        ),
        ("lora_unet_middle_block_2_emb_layers_1.alpha", "unet.mid_block.resnets.1.time_emb_proj"),
        ("lora_unet_input_blocks_3_0_op.alpha", "unet.down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_output_blocks_2_2_conv.alpha", "unet.up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_time_embed_2.alpha", "unet.time_embedding.linear_2"),
        (
            "lora_te1_text_model_encoder_layers_11_self_attn_out_proj.alpha",
            "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
        ),
        (
            "lora_te2_text_model_encoder_layers_31_mlp_fc2.lora_up.weight",
            "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
        ),
    ],
)
def test_kohyas_documented_names_are_diffusers_modules(key: str, module: str) -> None:
    parsed = parse_key(key)
    assert parsed is not None
    assert parsed.module == module
    part = key.split(".", 1)[1]
    wanted = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}[part]
    assert parsed.part == wanted
    assert write_key(module, parsed.part, "sgm") == key  # type: ignore[arg-type]


def test_sdxl_has_560_attention_722_and_788_kohya_modules(matrices: dict[str, nn.Module]) -> None:
    attention = [n for n in matrices if ".attn" in n]
    in_blocks = [n for n in matrices if "_block" in n]
    inside_attentions = [n for n in in_blocks if ".attentions." in n]
    assert len(attention) == 560
    assert len(inside_attentions) == 722
    assert len(in_blocks) == 788
    names = [kohya_name(n) for n in in_blocks]
    assert len(set(names)) == 788
    assert all(is_module(n) for n in matrices)


@pytest.mark.parametrize("layout", ["sgm", "blocks", "diffusers", "peft"])
def test_every_module_survives_every_layout(matrices: dict[str, nn.Module], layout: str) -> None:
    names = list(matrices)
    if layout != "peft":  # a peft file holds one model
        names += text_modules()
    for name in names:
        parsed = parse_key(write_key(name, "down", layout))  # type: ignore[arg-type]
        assert parsed is not None, name
        assert (parsed.module, parsed.part) == (name, "down")


def test_sgm_names_are_what_diffusers_own_converter_makes_of_them(unet: nn.Module) -> None:
    from diffusers.loaders import lora_conversion_utils as theirs

    names = [
        f"unet.{name}"
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ] + text_modules()
    numbered = {
        write_key(name, part, "sgm"): torch.tensor(float(i))
        for i, name in enumerate(names)
        for part in ("down", "up")
    }
    mapped = theirs._maybe_map_sgm_blocks_to_diffusers(dict(numbered), unet.config)
    converted, _ = theirs._convert_non_diffusers_lora_to_diffusers(mapped)
    assert len(converted) == 2 * len(names)
    for key, number in converted.items():
        parsed = parse_key(key)
        assert parsed is not None, key
        assert parsed.module == names[int(number)]


def test_kernels_follow_from_names(matrices: dict[str, nn.Module]) -> None:
    for name, module in matrices.items():
        wanted = module.kernel_size if isinstance(module, nn.Conv2d) else None
        assert kernel_of(name) == wanted, name


@pytest.mark.parametrize(
    ("key", "module", "part"),
    [
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "up",
        ),
        ("unet.conv_in.lora.down.weight", "unet.conv_in", "down"),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
            "down",
        ),
        (
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight",
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
            "up",
        ),
        (
            "text_encoder.encoder.layers.0.mlp.fc1.lora_A.default.weight",  # transformers 5
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
            "down",
        ),
        (
            "base_model.model.mid_block.attentions.0.proj_in.lora_B.my_adapter.weight",
            "unet.mid_block.attentions.0.proj_in",
            "up",
        ),
        (
            "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
            "down",
        ),
        (
            "diffusion_model.middle_block.1.proj_in.lora_up.weight",  # ComfyUI's own
            "unet.mid_block.attentions.0.proj_in",
            "up",
        ),
        (
            "lora_unet_middle_block_1_proj_in.lokr_w2_b",
            "unet.mid_block.attentions.0.proj_in",
            "lokr_w2_b",
        ),
    ],
)
def test_other_spellings_are_understood(key: str, module: str, part: str) -> None:
    parsed = parse_key(key)
    assert parsed is not None
    assert (parsed.module, parsed.part) == (module, part)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",  # FLUX
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",  # SD 1.x
        "lora_unet_input_blocks_0_1_proj_in.alpha",  # conv_in has no attention
        "lora_unet_input_blocks_3_1_proj_in.alpha",  # a downsampler has none either
        "lora_unet_input_blocks_4_2_proj_in.alpha",
        "lora_unet_middle_block_3_proj_in.alpha",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_1.alpha",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn3_to_q.alpha",
        "lora_unet_input_blocks_x_1_proj_in.alpha",
        "unet.mid_block.attentions.0.proj_in.lora_C.weight",
        "unet.mid_block.attentions.0.proj_in.weight",
        "transformer.single_blocks.0.lora_A.weight",
        "bundle_emb.dog.string_to_param",
        ".alpha",
        "",
    ],
)
def test_other_models_keys_are_not_understood(key: str) -> None:
    assert parse_key(key) is None


def test_layers_per_block_drives_the_numbering() -> None:
    # SD-like UNet with one resnet a block: down block 1 starts at input block 1 * 2 + 1
    assert to_sgm("down_blocks.1.resnets.0.conv1", 1) == "input_blocks.3.0.in_layers.2"
    assert from_sgm("input_blocks_3_0_in_layers_2", 1) == "down_blocks.1.resnets.0.conv1"
    assert to_sgm("up_blocks.1.attentions.1.proj_in", 1) == "output_blocks.3.1.proj_in"


def test_modules_without_a_name_are_refused() -> None:
    with pytest.raises(FileFormatError, match="not a module of SDXL"):
        write_key("unet.double_blocks.0.qkv", "down", "sgm")
    with pytest.raises(FileFormatError, match="no alpha"):
        write_key("unet.conv_in", "alpha", "diffusers")


def test_live_names_of_transformers_5_get_their_prefix_back() -> None:
    ours = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    assert canonical("text_encoder.encoder.layers.0.mlp.fc1") == ours
    assert canonical(ours) == ours
    assert canonical("text_encoder_2.text_projection") == "text_encoder_2.text_projection"


def test_a_checkpoint_holds_text_encoder_2_in_open_clips_words() -> None:
    layer = "text_encoder_2.text_model.encoder.layers.3"
    start = "conditioner.embedders.1.model.transformer.resblocks.3"
    assert checkpoint_slot(f"{layer}.self_attn.k_proj") == (f"{start}.attn.in_proj_weight", 1)
    assert checkpoint_slot(f"{layer}.mlp.fc2") == (f"{start}.mlp.c_proj.weight", None)
    assert checkpoint_slot("unet.mid_block.attentions.0.proj_in") == (
        "model.diffusion_model.middle_block.1.proj_in.weight",
        None,
    )
