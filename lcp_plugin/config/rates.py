"""Learning rates per module: UNet and text encoders, block-wise factors, LoRA+.

kohya's rules (networks/lora.py at 48d368fa): unet_lr and text_encoder_lr fall back to
learning_rate; a rate of 0 leaves the part untrained; LoRA+ (arXiv 2402.12354) multiplies B's rate.
Where we differ: two values of text_encoder_lr hold for one encoder each.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcp_plugin.config.network_args import NetworkArgs
from lcp_plugin.config.options import Options

NOTHING_TRAINS = (
    "nothing to train: every module has rank 0 or learning rate 0; set learning_rate, unet_lr, "
    "text_encoder_lr or network_args."
)


@dataclass(frozen=True)
class Rates:
    """Learning rates of a module's factors; 0 means that it is not trained."""

    down: float  # A
    up: float  # B

    @property
    def trains(self) -> bool:
        """Whether anything of the module is trained."""
        return self.down > 0 or self.up > 0


@dataclass(frozen=True)
class PartRates:
    """Learning rates of the base's three parts; 0: not trained."""

    unet: float
    text_encoder: float
    text_encoder_2: float

    @classmethod
    def of(cls, options: Options) -> PartRates:
        """What the options ask for."""
        general = options.learning_rate
        unet = general if options.unet_lr is None else options.unet_lr
        texts = options.text_encoder_lr or (general,)
        if not options.trains_text_encoders:
            texts = (0.0,)
        return cls(unet if options.trains_unet else 0.0, texts[0], texts[-1])

    @property
    def trains_texts(self) -> bool:
        """Whether a text encoder is trained."""
        return self.text_encoder > 0 or self.text_encoder_2 > 0


def trains_anything(options: Options) -> bool:
    """Whether some part has a rate and ranks above 0, as far as it can be told without a base."""
    rates = PartRates.of(options)
    return rates.trains_texts or (rates.unet > 0 and options.network.adapts_blocks)


def part_rate(module: str, rates: PartRates) -> float:
    """The rate of the part that a module, named as diffusers does, belongs to."""
    if module.startswith("unet."):
        return rates.unet
    return rates.text_encoder_2 if module.startswith("text_encoder_2.") else rates.text_encoder


def lora_plus_ratio(module: str, args: NetworkArgs) -> float:
    """B's rate over A's in a module."""
    if module.startswith("unet."):
        return args.loraplus_unet_lr_ratio or 1.0
    return args.loraplus_text_encoder_lr_ratio or 1.0


def module_rates(module: str, sgm_name: str, rates: PartRates, args: NetworkArgs) -> Rates:
    """The rates of a module's factors. `sgm_name`: a UNet module's name in SGM checkpoints
    (`input_blocks.4.1.proj_in`); not used for text encoders.
    """
    rate = part_rate(module, rates)
    if module.startswith("unet."):
        rate *= args.rate_weight(sgm_name)
    return Rates(rate, rate * lora_plus_ratio(module, args))
