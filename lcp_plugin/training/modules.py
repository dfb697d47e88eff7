"""Which modules of the base a task trains, its fresh adapter, and the optimizer's groups.

With dim_from_weights they are the modules of network_weights, at that file's ranks and alphas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lcp_plugin.adapter import AdapterSpec
from lcp_plugin.config.options import Options
from lcp_plugin.config.rates import part_rate
from lcp_plugin.formats.lora_file import LoraFile
from lcp_plugin.sdxl.adapted_unet import AdaptedUNet
from lcp_plugin.sdxl.layers import spec_of_layers
from lcp_plugin.sdxl.sites import LoraPair
from lcp_plugin.sdxl.targets import (
    Target,
    TargetSettings,
    group_by_rate,
    select_targets,
    special_alphas,
    special_ranks,
)
from lcp_plugin.seeds import derive_seed
from lcp_plugin.tasks import Task


def select_modules(
    adapted: AdaptedUNet, options: Options, weights: LoraFile | None
) -> dict[str, Target]:
    """Module name -> how a task with these options adapts it."""
    settings = TargetSettings.of(options)
    chosen = select_targets(adapted.layers, settings)
    if weights is None or not options.dim_from_weights:
        return chosen
    return {
        name: Target(f.rank, f.alpha, (chosen.get(name) or settings.of_part(name)).rates)
        for name, f in weights.adapter.items()
        if part_rate(name, settings.rates) > 0
    }


def make_spec(
    adapted: AdaptedUNet, options: Options, task: Task, seed: int, weights: LoraFile | None = None
) -> AdapterSpec:
    """What a fresh adapter of the task looks like. `seed`: the run's."""
    targets = select_modules(adapted, options, weights)
    adapted.check_fits(weights.adapter if weights is not None else {})
    layers = {name: adapted.layers[name] for name in targets}
    own_seed = derive_seed(seed, "adapter", task.index)
    return replace(
        spec_of_layers(layers, options.rank, options.alpha, own_seed),
        ranks=special_ranks(targets, options.rank),
        alphas=special_alphas(targets, options.alpha),
    )


def make_groups(
    adapted: AdaptedUNet, options: Options, weights: LoraFile | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups of the attached factors. Raises ConfigError if nothing trains."""
    chosen, settings = select_modules(adapted, options, weights), TargetSettings.of(options)
    pairs = adapted.pair_of
    targets = {name: chosen.get(name) or settings.of_part(name) for name in pairs}
    return group_by_rate({n: (p.down, p.up) for n, p in pairs.items()}, targets)


def set_dropout(pairs: Iterable[LoraPair], options: Options) -> None:
    """network_dropout, and rank_dropout and module_dropout of network_args."""
    args = options.network
    for pair in pairs:
        pair.dropout = options.network_dropout or 0.0
        pair.rank_dropout = args.rank_dropout or 0.0
        pair.module_dropout = args.module_dropout or 0.0
