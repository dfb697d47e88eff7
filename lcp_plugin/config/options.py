"""All options of a run in one frozen value: kohya's names, types and defaults, and our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any, get_type_hints

from lcp_plugin.config.network_args import NetworkArgs, parse_network_args
from lcp_plugin.config.options_data import DataOptions
from lcp_plugin.config.options_run import (
    ConfigOptions,
    ForeignOptions,
    LogOptions,
    MetadataOptions,
    RunOptions,
    SampleOptions,
    SaveOptions,
    ValidationOptions,
)
from lcp_plugin.config.options_train import (
    MemoryOptions,
    ModelOptions,
    NoiseOptions,
    OptimizerOptions,
)


@dataclass(frozen=True)
class Options(
    ForeignOptions,
    ConfigOptions,
    ValidationOptions,
    LogOptions,
    MetadataOptions,
    SaveOptions,
    SampleOptions,
    NoiseOptions,
    MemoryOptions,
    OptimizerOptions,
    ModelOptions,
    DataOptions,
    RunOptions,
):
    """One field per option; `Options()` holds kohya's defaults."""

    @property
    def rank(self) -> int:
        """network_dim, 4 where it is unset (as kohya has it)."""
        return 4 if self.network_dim is None else self.network_dim

    @property
    def alpha(self) -> float:
        """network_alpha; 0 means the rank (as kohya has it)."""
        return self.network_alpha or float(self.rank)

    @cached_property
    def network(self) -> NetworkArgs:
        """network_args, read once. Raises ConfigError with all problems."""
        return parse_network_args(self.network_args)

    @property
    def trains_text_encoders(self) -> bool:
        """Whether factors on the text encoders are trained."""
        return not self.network_train_unet_only

    @property
    def trains_unet(self) -> bool:
        """Whether factors on the UNet are trained."""
        return not self.network_train_text_encoder_only


@cache
def option_fields() -> Mapping[str, Field[Any]]:
    """Option name -> dataclass field, in the order of the documentation."""
    return MappingProxyType({f.name: f for f in fields(Options)})


@cache
def option_types() -> Mapping[str, Any]:
    """Option name -> its resolved type."""
    return MappingProxyType(get_type_hints(Options))
