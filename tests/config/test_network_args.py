"""network_args of networks.lora by hand-worked cases."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lcp_plugin.config.network_args import NUM_BLOCKS, block_index, parse_network_args
from lcp_plugin.config.options import Options
from lcp_plugin.errors import ConfigError

LISTED = ",".join(str(i) for i in range(NUM_BLOCKS))


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("time_embed.0", 0),
        ("label_emb.0.0", 0),
        ("input_blocks.0.0", 1),
        ("input_blocks.8.1.transformer_blocks.3.attn1.to_q", 9),
        ("middle_block.0.in_layers.2", 10),
        ("middle_block.1.proj_in", 11),
        ("middle_block.2.out_layers.3", 12),
        ("output_blocks.0.1.proj_out", 13),
        ("output_blocks.8.0.in_layers.2", 21),
        ("out.2", 22),
    ],
)
def test_modules_belong_to_their_block(module: str, block: int) -> None:
    assert block_index(module) == block


def test_without_arguments_everything_has_its_default() -> None:
    args = parse_network_args([])
    assert args.rank_of("middle_block.1.proj_in", False, 8) == 8
    assert args.alpha_of("middle_block.1.proj_in", False, 2.0) == 2.0
    assert args.rank_of("input_blocks.1.0.in_layers.2", True, 8) == 0  # 3x3: not adapted
    assert args.rate_weight("middle_block.1.proj_in") == 1.0
    assert not args.trains_convolutions


def test_convolutions_have_a_rank_and_alpha_of_their_own() -> None:
    args = parse_network_args(["conv_dim=4", "conv_alpha=2"])
    assert args.trains_convolutions
    conv = "input_blocks.1.0.in_layers.2"
    assert (args.rank_of(conv, True, 8), args.alpha_of(conv, True, 1.0)) == (4, 2.0)
    assert parse_network_args(["conv_dim=4"]).alpha_of(conv, True, 16.0) == 1.0


def test_blocks_have_ranks_and_alphas() -> None:
    args = parse_network_args([f"block_dims={LISTED}", f"block_alphas={LISTED}"])
    name = "output_blocks.2.1.proj_in"  # block 15
    assert (args.rank_of(name, False, 4), args.alpha_of(name, False, 1.0)) == (15, 15.0)
    assert args.rank_of("time_embed.0", False, 4) == 0


def test_rates_weigh_blocks_and_zero_leaves_them_out() -> None:
    weights = [
        "down_lr_weight=0,0,0,0,.5,1,1,1,1",
        "mid_lr_weight=2,2,2",
        "block_lr_zero_threshold=0.5",
    ]
    args = parse_network_args(weights)
    assert args.block_lr_weights == (1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, *[1] * 9, 1)
    assert args.rank_of("input_blocks.4.1.proj_in", False, 8) == 0
    assert args.rank_of("input_blocks.5.1.proj_in", False, 8) == 8


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("sine", lambda i: math.sin(math.pi / 2 * i / 8)),
        ("cosine", lambda i: math.sin(math.pi / 2 * (8 - i) / 8)),
        ("linear", lambda i: i / 8),
        ("reverse_linear", lambda i: (8 - i) / 8),
        ("zeros", lambda i: 0.0),
    ],
)
def test_named_courses_with_an_offset(name: str, formula: object) -> None:
    args = parse_network_args([f"up_lr_weight={name}+.25"])
    expected = [formula(i) + 0.25 for i in range(9)]  # type: ignore[operator]
    assert args.block_lr_weights[13:22] == pytest.approx(expected)


def test_lists_of_another_length_are_cut_or_filled_with_ones_and_told() -> None:
    twelve = ",".join(["0.5"] * 12)  # as for Stable Diffusion 1.5
    args = parse_network_args([f"down_lr_weight={twelve}", "mid_lr_weight=.5"])
    assert args.block_lr_weights == (1, *[0.5] * 9, 0.5, 1, 1, *[1] * 9, 1)
    assert len(args.notices) == 2
    assert "has 12 values, SDXL has 9" in args.notices[0]


def test_lora_plus_ratios_fall_back_to_the_common_one() -> None:
    args = parse_network_args(["loraplus_lr_ratio=16", "loraplus_text_encoder_lr_ratio=4"])
    assert (args.loraplus_unet_lr_ratio, args.loraplus_text_encoder_lr_ratio) == (16, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conv_dims=4", "Did you mean conv_dim"),
        ("conv_dim=four", "conv_dim = 'four': wanted numbers"),
        ("conv_dim=1,2", "wanted one number"),
        ("block_dims=1,2,3", "has 3 values; wanted 23"),
        ("rank_dropout=1", "wanted a share below 1"),
        ("conv_alpha=-1", "at least 0"),
    ],
)
def test_broken_arguments_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_network_args([text])


def test_options_read_their_network_args_once() -> None:
    options = Options(network_args=("conv_dim=4",))
    assert options.network is options.network
    assert options.network.conv_dim == 4
    assert replace(options, network_args=()).network.conv_dim is None
