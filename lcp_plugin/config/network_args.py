"""network_args of networks.lora: ranks per block, dropout of ranks and modules, block-wise rates.

Facts from kohya-ss/sd-scripts (networks/lora.py at 48d368fa). SDXL's UNet has 23 blocks in
checkpoint (SGM) naming:

    0       time_embed and label_emb: never adapted
    1-9     input_blocks 0-8
    10-12   middle_block 0-2
    13-21   output_blocks 0-8
    22      out: never adapted

A list that is given replaces network_dim (network_alpha, conv_dim, conv_alpha) block by block; 0
leaves a block out. Rates: down_lr_weight has 9 values, mid_lr_weight 3, up_lr_weight 9, each from
the input to the output of the UNet; or a preset: sine, cosine, linear, reverse_linear, zeros, with
+x added (cosine+.25). A rate of at most block_lr_zero_threshold is 0: the block is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lcp_plugin.config.findings import did_you_mean
from lcp_plugin.errors import ConfigError
from lcp_plugin.telling.wording import counted

NUM_BLOCKS = 23
_DOWN, _MID, _UP = 9, 3, 9
_WITH_TRANSFORMERS = (5, 6, 8, 9, 11, *range(13, 19))  # input 4, 5, 7, 8; middle 1; output 0-5
_IN_BLOCKS = tuple(range(2, NUM_BLOCKS - 1))  # all but the first and the last convolution
_INPUT = re.compile(r"^input_blocks\.(\d+)\.")
_MIDDLE = re.compile(r"^middle_block\.(\d+)\.")
_OUTPUT = re.compile(r"^output_blocks\.(\d+)\.")
_PRESETS: Mapping[str, Callable[[int, int], float]] = {
    "sine": lambda i, n: math.sin(math.pi / 2 * i / (n - 1)),
    "cosine": lambda i, n: math.cos(math.pi / 2 * i / (n - 1)),
    "linear": lambda i, n: i / (n - 1),
    "reverse_linear": lambda i, n: 1 - i / (n - 1),
    "zeros": lambda i, n: 0.0,
}
NETWORK_ARGS: Mapping[str, str] = {
    "conv_dim": "rank on 3x3 convolutions; given: the whole of ResnetBlock2D is adapted too",
    "conv_alpha": "their alpha; unset: 1",
    "rank_dropout": "share of ranks left out, drawn for each image",
    "module_dropout": "share of modules left out of a step",
    "block_dims": "23 ranks, one for each block",
    "block_alphas": "23 alphas",
    "conv_block_dims": "23 ranks on 3x3 convolutions",
    "conv_block_alphas": "23 alphas on 3x3 convolutions",
    "down_lr_weight": "9 factors of unet_lr, or sine, cosine, linear, reverse_linear, zeros, +x",
    "mid_lr_weight": "3 factors of unet_lr",
    "up_lr_weight": "9 factors of unet_lr, or a name as for down_lr_weight",
    "block_lr_zero_threshold": "blocks with a factor up to this are left out",
    "loraplus_lr_ratio": "B's learning rate over A's (LoRA+, arXiv 2402.12354)",
    "loraplus_unet_lr_ratio": "the same for the UNet only",
    "loraplus_text_encoder_lr_ratio": "the same for text encoders only",
}


@dataclass(frozen=True)
class NetworkArgs:
    """network_args, converted. Empty tuples and None mean: not given."""

    conv_dim: int | None = None
    conv_alpha: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    block_dims: tuple[int, ...] = ()  # 23
    block_alphas: tuple[float, ...] = ()
    conv_block_dims: tuple[int, ...] = ()
    conv_block_alphas: tuple[float, ...] = ()
    block_lr_weights: tuple[float, ...] = field(default=())  # 23 factors of unet_lr
    loraplus_unet_lr_ratio: float | None = None  # B's rate over A's
    loraplus_text_encoder_lr_ratio: float | None = None
    notices: tuple[str, ...] = ()

    @property
    def adapted_weights(self) -> tuple[float, ...]:
        """The distinct factors of unet_lr in blocks where something is adapted."""
        blocks = _IN_BLOCKS if self.trains_convolutions else _WITH_TRANSFORMERS
        weights = self.block_lr_weights or (1.0,) * NUM_BLOCKS
        return tuple(sorted({weights[block] for block in blocks} - {0.0}))

    @property
    def adapts_blocks(self) -> bool:
        """Whether a block is left whose ranks and rate are above 0."""
        weights, every = self.block_lr_weights or (1.0,) * NUM_BLOCKS, (1,) * NUM_BLOCKS
        wide = self.conv_block_dims or (self.conv_dim or 0,) * NUM_BLOCKS
        blocks = _IN_BLOCKS if self.trains_convolutions else _WITH_TRANSFORMERS
        ranks = [(self.block_dims or every)[b] + wide[b] for b in range(NUM_BLOCKS)]
        return any(ranks[block] * weights[block] > 0 for block in blocks)

    @property
    def trains_convolutions(self) -> bool:
        """Whether 3x3 convolutions (and with them the whole of ResnetBlock2D) are adapted."""
        return self.conv_dim is not None or bool(self.conv_block_dims)

    def rank_of(self, module: str, is_conv: bool, default: int) -> int:
        """The rank of a UNet module in SGM naming; 0: not adapted. `is_conv`: 3x3."""
        if self.rate_weight(module) == 0:
            return 0
        if is_conv:
            ranks, default = self.conv_block_dims, self.conv_dim or 0
        else:
            ranks = self.block_dims
        return ranks[block_index(module)] if ranks else default

    def alpha_of(self, module: str, is_conv: bool, default: float) -> float:
        """The alpha of a UNet module in SGM naming."""
        if is_conv:
            default = 1.0 if self.conv_alpha is None else self.conv_alpha
            alphas = self.conv_block_alphas
        else:
            alphas = self.block_alphas
        return alphas[block_index(module)] if alphas else default

    def rate_weight(self, module: str) -> float:
        """The factor of unet_lr for a UNet module in SGM naming; 0: not trained."""
        if not self.block_lr_weights:
            return 1.0
        return self.block_lr_weights[block_index(module)]


def block_index(module: str) -> int:
    """Which of the 23 blocks a UNet module, named as in SGM checkpoints, belongs to."""
    if found := _INPUT.match(module):
        return 1 + int(found[1])
    if found := _MIDDLE.match(module):
        return 1 + _DOWN + int(found[1])
    if found := _OUTPUT.match(module):
        return 1 + _DOWN + _MID + int(found[1])
    return NUM_BLOCKS - 1 if module.startswith("out.") else 0


def parse_network_args(texts: Sequence[str]) -> NetworkArgs:
    """key=value texts as NetworkArgs. Raises ConfigError with all problems."""
    given: dict[str, str] = {}
    problems = []
    for text in texts:
        key, _, value = text.partition("=")
        if key.strip() in NETWORK_ARGS:
            given[key.strip()] = value.strip()
        else:
            problems.append(f"network_args: unknown key {key!r}.{did_you_mean(key, NETWORK_ARGS)}")
    if problems:
        raise ConfigError(*problems)
    ratio = _number(given, "loraplus_lr_ratio")
    unet_ratio = _number(given, "loraplus_unet_lr_ratio")
    text_ratio = _number(given, "loraplus_text_encoder_lr_ratio")
    conv_dim = _number(given, "conv_dim")
    return NetworkArgs(
        conv_dim=None if conv_dim is None else int(conv_dim),
        conv_alpha=_number(given, "conv_alpha"),
        rank_dropout=_share(given, "rank_dropout"),
        module_dropout=_share(given, "module_dropout"),
        block_dims=tuple(int(v) for v in _blocks(given, "block_dims")),
        block_alphas=_blocks(given, "block_alphas"),
        conv_block_dims=tuple(int(v) for v in _blocks(given, "conv_block_dims")),
        conv_block_alphas=_blocks(given, "conv_block_alphas"),
        block_lr_weights=_rate_weights(given),
        loraplus_unet_lr_ratio=ratio if unet_ratio is None else unet_ratio,
        loraplus_text_encoder_lr_ratio=ratio if text_ratio is None else text_ratio,
        notices=_notices(given),
    )


def _numbers(given: Mapping[str, str], key: str) -> tuple[float, ...]:
    text = given[key].strip("()[] ")
    try:
        values = tuple(float(v) for v in text.split(",") if v.strip())
    except ValueError:
        values = ()
    if not values or not all(0 <= value < math.inf for value in values):
        raise ConfigError(f"network_args: {key} = {given[key]!r}: wanted numbers of at least 0.")
    return values


def _number(given: Mapping[str, str], key: str) -> float | None:
    if key not in given:
        return None
    values = _numbers(given, key)
    if len(values) != 1:
        raise ConfigError(f"network_args: {key} = {given[key]!r}: wanted one number.")
    return values[0]


def _share(given: Mapping[str, str], key: str) -> float | None:
    value = _number(given, key)
    if value is not None and value >= 1:
        raise ConfigError(f"network_args: {key} = {value:g}: wanted a share below 1.")
    return value


def _blocks(given: Mapping[str, str], key: str) -> tuple[float, ...]:
    if key not in given:
        return ()
    values = _numbers(given, key)
    if len(values) != NUM_BLOCKS:
        raise ConfigError(
            f"network_args: {key} has {counted(len(values), 'value')}; wanted {NUM_BLOCKS}."
        )
    return values


def _rate_weights(given: Mapping[str, str]) -> tuple[float, ...]:
    keys = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
    if not any(key in given for key in keys):
        return ()
    down = _part(given, "down_lr_weight", _DOWN)
    middle = _part(given, "mid_lr_weight", _MID)
    up = _part(given, "up_lr_weight", _UP)
    least = _number(given, "block_lr_zero_threshold") or 0.0
    weights = (1.0, *down, *middle, *up, 1.0)
    return tuple(0.0 if weight <= least else weight for weight in weights)


def _part(given: Mapping[str, str], key: str, count: int) -> tuple[float, ...]:
    """Factors of one part of the UNet; too many are cut off, missing ones are 1 (as kohya)."""
    if key not in given:
        return (1.0,) * count
    name, _, added = given[key].partition("+")
    if name in _PRESETS:
        base = (_number({key: added}, key) or 0.0) if added else 0.0
        return tuple(_PRESETS[name](i, count) + base for i in range(count))
    numbers = _numbers(given, key)
    return (*numbers[:count], *(1.0,) * (count - len(numbers)))


def _notices(given: Mapping[str, str]) -> tuple[str, ...]:
    """Lists of another length than SDXL's blocks need."""
    told = []
    for key, count in (("down_lr_weight", _DOWN), ("mid_lr_weight", _MID), ("up_lr_weight", _UP)):
        if key not in given or given[key].partition("+")[0] in _PRESETS:
            continue
        number = len(_numbers(given, key))
        if number != count:
            rest = "the rest are 1" if number < count else "the rest are not used"
            told.append(
                f"network_args: {key} has {counted(number, 'value')}, SDXL has {count}; {rest}."
            )
    return tuple(told)
