"""Learning rates per module: UNet and text encoders, block-wise factors, LoRA+.

kohya's rules (networks/lora.py at 48d368fa): unet_lr and text_encoder_lr fall back to
learning_rate; a rate of 0 leaves the part untrained; LoRA+ (arXiv 2402.12354) multiplies B's rate.
Where we differ: two values of text_encoder_lr hold for one encoder each.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcp_plugin.config.network_args import NetworkArgs
from lcp_plugin.config.options import Options


@dataclass(frozen=True)
class Rates:
    """Learning rates of a module's factors; 0 means that it is not trained."""

    down: float  # A
    up: float  # B

    @property
    def trains(self) -> bool:
        """Whether anything of the module is trained."""
        return self.down > 0 or self.up > 0


def part_rate(module: str, options: Options) -> float:
    """The rate of the part that a module, named as diffusers does, belongs to."""
    if module.startswith("unet."):
        if not options.trains_unet:
            return 0.0
        return options.learning_rate if options.unet_lr is None else options.unet_lr
    if not options.trains_text_encoders:
        return 0.0
    if not options.text_encoder_lr:
        return options.learning_rate
    return options.text_encoder_lr[-1 if module.startswith("text_encoder_2.") else 0]


def module_rates(module: str, sgm_name: str, options: Options, args: NetworkArgs) -> Rates:
    """The rates of a module's factors. `sgm_name`: a UNet module's name in SGM checkpoints
    (`input_blocks.4.1.proj_in`); not used for text encoders.
    """
    rate = part_rate(module, options)
    if module.startswith("unet."):
        rate *= args.rate_weight(sgm_name)
        ratio = args.loraplus_unet_lr_ratio
    else:
        ratio = args.loraplus_text_encoder_lr_ratio
    return Rates(rate, rate * (ratio or 1.0))
