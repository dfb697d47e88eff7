"""Adapted layers, ranks and rates on SDXL's own shapes (meta device, no memory)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import pytest
import torch
from torch import nn
from toy_unets import sdxl_unet

from lcp_plugin.config.options import Options
from lcp_plugin.errors import ConfigError
from lcp_plugin.sdxl.layers import find_layers
from lcp_plugin.sdxl.targets import (
    TargetSettings,
    group_by_rate,
    select_targets,
    special_alphas,
    special_ranks,
)

Layers = Mapping[str, nn.Module]
UNET_ONLY = {"network_train_unet_only": True, "learning_rate": 1.0}
CONV = "unet.down_blocks.0.resnets.0.conv1"
LINEAR = "unet.mid_block.attentions.0.proj_in"


def count_by_part(names: Iterable[str]) -> dict[str, int]:
    """Adapted layers of unet, text_encoder and text_encoder_2."""
    return Counter(name.split(".")[0] for name in names)


@pytest.fixture(scope="module")
def layers() -> Layers:
    """SDXL's linear and convolutional layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet = sdxl_unet()
    with torch.device("meta"):
        one = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
        two = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                projection_dim=1280,
            )
        )
    return find_layers({"unet": unet, "text_encoder": one, "text_encoder_2": two})


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ({"lora_targets": "attention"}, {"unet": 560}),
        ({"lora_targets": "transformer"}, {"unet": 722}),
        ({"lora_targets": "transformer", "network_args": ("conv_dim=4",)}, {"unet": 788}),
        (
            {"lora_targets": "transformer", "network_train_unet_only": False},
            {"unet": 722, "text_encoder": 72, "text_encoder_2": 192},
        ),
        (
            {
                "lora_targets": "transformer",
                "network_train_unet_only": False,
                "network_train_text_encoder_only": True,
            },
            {"text_encoder": 72, "text_encoder_2": 192},
        ),
        ({"network_train_unet_only": False, "text_encoder_lr": (0.0,)}, {"unet": 560}),
    ],
)
def test_the_number_of_layers_is_kohyas(
    layers: Layers, given: dict[str, object], counts: dict[str, int]
) -> None:
    options = Options(**{**UNET_ONLY, **given})
    assert count_by_part(select_targets(layers, TargetSettings.of(options))) == counts


def test_convolutions_have_ranks_of_their_own_but_one_by_ones_do_not(layers: Layers) -> None:
    options = Options(
        **UNET_ONLY, network_dim=16, network_alpha=8, network_args=("conv_dim=4", "conv_alpha=2")
    )
    targets = select_targets(layers, TargetSettings.of(options))
    assert (targets[CONV].rank, targets[CONV].alpha) == (4, 2.0)
    shortcut = next(t for n, t in targets.items() if n.endswith("conv_shortcut"))
    embedding = next(t for n, t in targets.items() if n.endswith("time_emb_proj"))
    assert shortcut.rank == embedding.rank == 16
    # 17 residual blocks with two 3x3 convolutions, 2 down- and 2 upsamplers
    assert list(special_ranks(targets, 16).values()) == [4] * (17 * 2 + 2 + 2)
    assert set(special_alphas(targets, 8.0).values()) == {2.0}


def test_blocks_with_rank_or_rate_zero_are_left_out(layers: Layers) -> None:
    middle = Options(**UNET_ONLY, network_args=("mid_lr_weight=0,0,0",))
    assert Counter(
        name.split(".")[0] for name in select_targets(layers, TargetSettings.of(middle))
    ) == {"unet": 560 - 10 * 8}
    dims = ",".join(["8"] * 10 + ["0"] * 3 + ["2"] * 10)
    only = Options(**UNET_ONLY, network_dim=8, network_args=(f"block_dims={dims}",))
    targets = select_targets(layers, TargetSettings.of(only))
    assert not any(".mid_block." in name for name in targets)
    assert {t.rank for n, t in targets.items() if ".up_blocks." in n} == {2}
    assert {t.rank for n, t in targets.items() if ".down_blocks." in n} == {8}


def test_nothing_to_train_is_refused(layers: Layers) -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        select_targets(
            layers, TargetSettings.of(Options(network_train_unet_only=True, unet_lr=0.0))
        )


def test_groups_hold_parameters_of_one_rate(layers: Layers) -> None:
    options = Options(
        network_module="networks.lora",
        lora_targets="transformer",
        learning_rate=1.0,
        text_encoder_lr=(0.5, 0.25),
        network_args=("loraplus_unet_lr_ratio=4", "mid_lr_weight=1,.5,1"),
    )
    targets = select_targets(layers, TargetSettings.of(options))
    first = next(n for n in targets if n.startswith("text_encoder."))
    second = next(n for n in targets if n.startswith("text_encoder_2."))
    other = next(n for n in targets if ".down_blocks." in n)
    names = (LINEAR, other, first, second)
    factors = {n: (nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))) for n in names}
    groups = group_by_rate(factors, targets)
    assert {g["lr"]: len(g["params"]) for g in groups} == {
        0.5: 1 + 2,  # A of the middle block; both factors of text encoder 1
        2.0: 1,  # its B
        1.0: 1,  # A of a down block
        4.0: 1,
        0.25: 2,
    }


def test_frozen_factors_are_left_out_of_groups(layers: Layers) -> None:
    targets = select_targets(
        layers, TargetSettings.of(Options(**UNET_ONLY, lora_targets="transformer"))
    )
    frozen, trained = nn.Parameter(torch.ones(1), requires_grad=False), nn.Parameter(torch.ones(1))
    groups = group_by_rate({LINEAR: (frozen, trained)}, targets)
    assert [g["params"] for g in groups] == [[trained]]
