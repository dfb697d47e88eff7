"""What a config leaves open and the strategy or the base decides, settled before a model is loaded.

Files then record what was really used, and replaying a run finds it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lcp_plugin.config.check import cannot_start
from lcp_plugin.config.load import RunConfig
from lcp_plugin.config.prompts import read_prompts
from lcp_plugin.config.samplers import FROM_PURE_NOISE
from lcp_plugin.errors import ConfigError, StrategyError
from lcp_plugin.hooks import Strategy
from lcp_plugin.registry import create_strategy, describe_arguments, find
from lcp_plugin.sdxl.traits import read_traits

_SAYS_SO = "the base's own files say that its last timestep is pure noise"


def settle(config: RunConfig) -> RunConfig:
    """The config as a run takes it. Raises ConfigError, BaseModelError."""
    return settle_zero_terminal(settle_init(config))


def settle_init(config: RunConfig) -> RunConfig:
    """The config with lora_init among the strategy's arguments, if the strategy takes one and none
    is given there: so files record it, and replaying finds it again.
    """
    options = config.options
    init = options.lora_init
    if init is None or any(arg.startswith("init=") for arg in options.strategy_args):
        return config
    args = (*options.strategy_args, f"init={init}")
    if not _can_be_made(options.strategy, args):
        text = f"lora_init = {init} has no effect: {options.strategy} starts A its own way."
        return replace(config, notices=(*config.notices, text))
    return replace(config, options=replace(options, strategy_args=args))


def _can_be_made(name: str, args: Sequence[str]) -> bool:
    """A strategy from these arguments; what else is wrong with them is told where it is made."""
    if "init" not in describe_arguments(find(Strategy, name)):
        return False
    try:
        create_strategy(name, args)
    except StrategyError:
        return False
    return True


def settle_zero_terminal(config: RunConfig) -> RunConfig:
    """The config with zero_terminal_snr on where the base says so and the user says nothing.

    Raises ConfigError for a sampler that cannot start from pure noise.
    """
    options = config.options
    if (
        options.zero_terminal_snr
        or not read_traits(options.pretrained_model_name_or_path).zero_terminal_snr
    ):
        return config
    if "zero_terminal_snr" in config.provenance:
        text = f"{_SAYS_SO}, but zero_terminal_snr = false is given and holds."
        return replace(config, notices=(*config.notices, text))
    if options.sample_prompts and options.sample_sampler not in FROM_PURE_NOISE:
        raise ConfigError(
            f"sample_sampler = {options.sample_sampler!r} cannot start from pure noise, and "
            f"{_SAYS_SO}; use one of {', '.join(FROM_PURE_NOISE)}."
        )
    if options.sample_prompts:
        prompts = read_prompts(options.sample_prompts)
        if unfit := {p.sample_sampler for p in prompts if p.sample_sampler} - set(FROM_PURE_NOISE):
            raise ConfigError(f"sample_prompts {cannot_start(unfit)}")

    tasks = (replace(t, options=replace(t.options, zero_terminal_snr=True)) for t in config.tasks)
    return replace(
        config,
        options=replace(options, zero_terminal_snr=True),
        tasks=tuple(tasks),
        provenance={**config.provenance, "zero_terminal_snr": "the base's own files"},
        notices=(*config.notices, f"{_SAYS_SO}: zero_terminal_snr is on."),
    )
