"""Learning rates of parts and modules."""

from __future__ import annotations

import pytest

from lcp_plugin.config.network_args import parse_network_args
from lcp_plugin.config.options import Options
from lcp_plugin.config.rates import PartRates, Rates, module_rates, part_rate

UNET = "unet.mid_block.attentions.0.proj_in"
ONE = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
TWO = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ({}, (1.0, 1.0, 1.0)),
        ({"unet_lr": 0.5}, (0.5, 1.0, 1.0)),
        ({"text_encoder_lr": (0.25,)}, (1.0, 0.25, 0.25)),
        ({"text_encoder_lr": (0.25, 0.125)}, (1.0, 0.25, 0.125)),
        ({"text_encoder_lr": (0.0, 0.125)}, (1.0, 0.0, 0.125)),
        ({"network_train_unet_only": True}, (1.0, 0.0, 0.0)),
        ({"network_train_text_encoder_only": True}, (0.0, 1.0, 1.0)),
    ],
)
def test_parts_have_their_own_rates(
    given: dict[str, object], rates: tuple[float, float, float]
) -> None:
    options = Options(learning_rate=1.0, **given)
    assert tuple(part_rate(m, PartRates.of(options)) for m in (UNET, ONE, TWO)) == rates


def test_blocks_weigh_the_unets_rate_only() -> None:
    args = parse_network_args(["mid_lr_weight=1,.5,1"])
    rates = PartRates.of(Options(learning_rate=1.0))
    assert module_rates(UNET, "middle_block.1.proj_in", rates, args) == Rates(0.5, 0.5)
    assert module_rates(ONE, "", rates, args) == Rates(1.0, 1.0)


def test_lora_plus_multiplies_the_rate_of_b() -> None:
    args = parse_network_args(["loraplus_unet_lr_ratio=16", "loraplus_text_encoder_lr_ratio=4"])
    rates = PartRates.of(Options(learning_rate=1.0))
    assert module_rates(UNET, "middle_block.1.proj_in", rates, args) == Rates(1.0, 16.0)
    assert module_rates(TWO, "", rates, args) == Rates(1.0, 4.0)


def test_a_rate_of_zero_means_untrained() -> None:
    args = parse_network_args(["mid_lr_weight=1,0,1"])
    assert not module_rates(UNET, "middle_block.1.proj_in", PartRates.of(Options()), args).trains
