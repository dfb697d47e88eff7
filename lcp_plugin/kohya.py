"""A `network_module` for sd-scripts: our task boundary inside kohya's own trainers.

    accelerate launch sdxl_train_network.py ... --network_module lcp_plugin.kohya
        --network_args strategy=merge_ortho_init prev=boots.safetensors task=can concept="twt can"

The strategy's begin_task decides what training starts from: what earlier tasks learned lies frozen
under the new factors. `save_weights` lets end_task merge and writes what our own trainer delivers:
every task so far in one LoRA, with its lineage in the header, ready for the next `prev=`.

    strategy, prev, task, concept, kind    as in our configs; prev: task folder, run or LoRA
    lora_targets     transformer (default: kohya's 722 layers) or attention (560)
    seed             of the start; torch's own by default
    rank_dropout, module_dropout     as in networks.lora;  neuron dropout is --network_dropout
    allow_strategy_change=true       for a parent of another strategy
    anything else    is an argument of the strategy

The functions and methods are those that sd-scripts calls (train_network.py at 48d368fa). Different
from networks.lora: --network_weights brings its own alpha, and the modules that are not trained
(text encoders in a UNet-only run) stay in effect and in the saved file. Strategies that use step
hooks need our trainer: sd-scripts calls none.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcp_plugin.adapter import AdapterSpec
from lcp_plugin.biases import Change
from lcp_plugin.delta import Delta
from lcp_plugin.errors import ConfigError, LineageError, StrategyError
from lcp_plugin.formats.checked_lora import write_checked_lora
from lcp_plugin.formats.foreign_header import named_base
from lcp_plugin.formats.lora_file import (
    BIAS_READERS,
    LoraFile,
    lora_from_tensors,
    portable_adapter,
    read_lora,
)
from lcp_plugin.hooks import Carry, Strategy, TaskStart, step_hooks_of
from lcp_plugin.registry import create_strategy
from lcp_plugin.run.chaining import (
    check_base,
    check_name,
    fit_strategy,
    identify_given,
    tell_apart,
)
from lcp_plugin.sdxl.kohya_network import LoraNetwork, choose_layers
from lcp_plugin.sdxl.layers import name_layers, spec_of_layers
from lcp_plugin.sdxl.load import BaseId
from lcp_plugin.sdxl.sites import fuse_for_good
from lcp_plugin.seeds import derive_seed
from lcp_plugin.store.carries import deliverable_adapter, lineage_of
from lcp_plugin.store.deliverable_header import complete_header, counts_of
from lcp_plugin.store.parents import read_parent
from lcp_plugin.store.task_folder import Parent
from lcp_plugin.tasks import Task
from lcp_plugin.telling.wording import counted

log = logging.getLogger(__name__)

OWN_ARGUMENTS = (
    *("strategy", "prev", "task", "concept", "kind", "lora_targets", "seed"),
    *("rank_dropout", "module_dropout", "allow_strategy_change"),
)


@dataclass(frozen=True)
class Arguments:
    """`--network_args`, read."""

    strategy: Strategy
    strategy_args: tuple[str, ...]
    parent: Parent
    task: Task
    targets: str
    seed: int
    rank_dropout: float
    module_dropout: float

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Arguments:
        """From kohya's key=value texts.

        Raises:
            StrategyError, LineageError, ConfigError: an argument that does not fit, in one line.
        """
        texts = {name: str(value) for name, value in given.items() if value is not None}
        own = {name: texts.pop(name) for name in OWN_ARGUMENTS if name in texts}
        strategy_args = tuple(f"{name}={value}" for name, value in sorted(texts.items()))
        strategy = create_strategy(own.get("strategy", "merge_init"), strategy_args)
        _refuse_step_hooks(strategy)
        parent = _parent_of(own, strategy, strategy_args)
        if parent.state:
            strategy.load_state_dict(parent.state)
        targets = own.get("lora_targets", "transformer")
        if targets not in ("transformer", "attention"):
            raise ConfigError(f"lora_targets={targets}: use transformer or attention.")
        return cls(
            strategy,
            strategy_args,
            parent,
            _task_of(own, parent),
            targets,
            int(own.get("seed") or torch.initial_seed() % 2**63),
            float(own.get("rank_dropout", 0)),
            float(own.get("module_dropout", 0)),
        )


def _parent_of(own: Mapping[str, str], strategy: Strategy, args: Sequence[str]) -> Parent:
    """What `prev` names, as this strategy and this task may go on from it."""
    if not own.get("prev"):
        return Parent()
    parent = read_parent(Path(own["prev"]).expanduser())
    allowed = own.get("allow_strategy_change", "").lower() in ("true", "1", "yes")
    option = "allow_strategy_change=true"
    parent = fit_strategy("prev", parent, (strategy.name, args), allowed, option)
    parent = tell_apart(parent, [own.get("task", "")])
    if own.get("task"):
        check_name(own["task"], parent, "say task=NAME with another name")
    return parent


def _refuse_step_hooks(strategy: Strategy) -> None:
    used = step_hooks_of(strategy)
    if "rehearse" in used:
        raise StrategyError(
            f"strategy {strategy.name} rehearses, which sd-scripts never calls for; train it with "
            "train_continual_sdxl.py, or let lcp rehearse draw what the chain knows "
            "as a regularisation folder."
        )
    if used:
        raise StrategyError(
            f"strategy {strategy.name} uses {used[0]}, which sd-scripts never calls; "
            "train it with train_continual_sdxl.py."
        )


def _task_of(own: Mapping[str, str], parent: Parent) -> Task:
    records = parent.carry.tasks
    index = (records[-1].index if records else 0) + 1
    taken = {record.name for record in records}
    free = (f"task{number}" for number in range(index, index + len(taken) + 1))
    name = own.get("task") or next(name for name in free if name not in taken)
    return Task(
        index=index,
        name=name,
        kind="style" if own.get("kind") == "style" else "object",
        concept=own.get("concept") or name,
        prompts=(),
    )


# -------------------------------------------------------------------- what sd-scripts imports


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: object,
    text_encoder: nn.Module | Sequence[nn.Module],
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> ContinualNetwork:
    """The network of a new task. kohya's defaults: dim 4, alpha 1."""
    kwargs.pop("dropout", None)  # a second name that sd-scripts passes for neuron_dropout
    arguments = Arguments.read(kwargs)
    rank = int(network_dim or 4)
    alpha = float(1 if network_alpha is None else network_alpha) or float(rank)
    layers = name_layers(unet, _as_list(text_encoder))
    spec = _spec(layers, choose_layers(layers, arguments.targets), rank, alpha, arguments)
    return ContinualNetwork(multiplier, layers, spec, arguments, float(neuron_dropout or 0))


def create_network_from_weights(
    multiplier: float,
    file: str | None,
    vae: object,
    text_encoder: nn.Module | Sequence[nn.Module],
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> tuple[ContinualNetwork, dict[str, Tensor]]:
    """A network with the modules, ranks and alphas of a LoRA file, of any layout."""
    kwargs.pop("dropout", None)
    lora = read_lora(file) if file else _lora_of(weights_sd)
    arguments = Arguments.read(kwargs)
    layers = name_layers(unet, _as_list(text_encoder))
    names = [name for name in lora.adapter if name in layers]
    spec = _spec(layers, names, 4, 1.0, arguments)
    spec = replace(
        spec,
        ranks={name: lora.adapter[name].rank for name in names},
        alphas={name: lora.adapter[name].alpha for name in names},
    )
    network = ContinualNetwork(multiplier, layers, spec, arguments, float(neuron_dropout or 0))
    network.lora, network.for_inference = lora, for_inference
    return network, dict(weights_sd or {})


def _lora_of(weights: Mapping[str, Tensor] | None) -> LoraFile:
    if not weights:
        raise ConfigError("create_network_from_weights needs a file or its tensors.")
    return lora_from_tensors(weights, {}, Path("weights_sd"))


def _as_list(text_encoder: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    if text_encoder is None:
        return []
    return [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder)


def _spec(
    layers: Mapping[str, nn.Module], names: Iterable[str], rank: int, alpha: float, args: Arguments
) -> AdapterSpec:
    seed = derive_seed(args.seed, "adapter", args.task.index)
    return spec_of_layers({name: layers[name] for name in names}, rank, alpha, seed)


# ------------------------------------------------------------------------------- the network


class ContinualNetwork(LoraNetwork):
    """One task's factors on the trainer's models, between begin_task and end_task."""

    def __init__(
        self,
        multiplier: float,
        layers: dict[str, nn.Module],
        spec: AdapterSpec,
        arguments: Arguments,
        dropout: float,
    ) -> None:
        dropouts = {
            "dropout": dropout,
            "rank_dropout": arguments.rank_dropout,
            "module_dropout": arguments.module_dropout,
        }
        super().__init__(multiplier, layers, dropouts)
        self.lora: LoraFile | None = None  # of create_network_from_weights
        self.for_inference = False  # apply_to then puts the file's own factors on at once
        self._spec, self._arguments = spec, arguments
        self._carry = arguments.parent.carry
        self._start: TaskStart | None = None
        self._base: BaseId | None = None  # of prepare_network
        self._resting = Change()  # what network_weights brought for modules that do not train

    # ------------------------------------------------------------------------ setting up

    def prepare_network(self, args: Any) -> None:
        """Checks that only the trainer's own options allow: the base, and stale text caches.

        Raises:
            LineageError: the parent was trained on another base.
            ConfigError: text encoders are cached before the parent's change of them is applied.
        """
        parent = self._arguments.parent
        cached = getattr(args, "cache_text_encoder_outputs", False)
        if cached and any(not n.startswith("unet.") for n in parent.carry.change.modules()):
            raise ConfigError(
                "prev changes the text encoders, but cache_text_encoder_outputs stores what they "
                "said before; drop cache_text_encoder_outputs."
            )
        self._base = identify_given(args)
        if self._base is None and parent.base_hash:
            log.warning("the base could not be compared with the parent's '%s'", parent.base_name)
        check_base("prev", parent, self._base)

    def apply_to(
        self,
        text_encoder: object,
        unet: object,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """begin_task: the carry goes under the models, the new factors onto the chosen layers."""
        chosen = [
            name
            for name in self._spec.shapes
            if (apply_unet if name.startswith("unet.") else apply_text_encoder)
        ]
        shapes = {name: self._spec.shapes[name] for name in chosen}
        self._spec = replace(self._spec, shapes=shapes)
        start = self._arguments.strategy.begin_task(self._arguments.task, self._carry, self._spec)
        self._start = start
        self.check_fits(start.adapter)
        self.set_base(start.base)
        self.add_biases(self._carry.biases)
        self.set_factors(start.adapter, start.trainable)
        log.info(
            "%s: task %d (%s), in training: %s, on %d that %s changed",
            self._arguments.strategy.name,
            self._arguments.task.index,
            self._arguments.task.name,
            counted(len(start.adapter), "layer"),
            len(start.base),
            counted(len(self._carry.tasks), "earlier task"),
        )

        if self.for_inference and self.lora is not None:
            self._load(self.lora, "the file")

    def load_weights(self, file: str) -> str:
        """--network_weights: start from these factors, with their own alpha and rank. Modules that
        do not train here stay in effect, frozen, and in what is saved.
        """
        return self._load(read_lora(file), file)

    def _load(self, lora: LoraFile, file: str) -> str:
        self.check_fits(lora.total)
        training = self.trained()
        fitting = {n: f for n, f in lora.adapter.items() if n in training}
        for name, factors in fitting.items():
            if factors.rank != training[name].rank:
                raise LineageError(
                    f"{file} has rank {factors.rank} in {name}, network_dim is "
                    f"{training[name].rank}; use the same or --dim_from_weights."
                )
        assert self._start is not None
        self.set_factors(lora.adapter.restrict(fitting), self._start.trainable)
        resting = Change(lora.delta + Delta.of(lora.adapter.without(fitting)), lora.biases)
        self.set_base(resting.delta)
        self.add_biases(resting.biases)
        self._resting = self._resting + resting
        return f"{counted(len(fitting), 'module')} in training, {len(resting.modules())} at rest"

    # ------------------------------------------------------------------------------ saving

    def carry_after(self) -> Carry:
        """end_task on the factors as they are now; may be asked for at every save."""
        strategy = copy.deepcopy(self._arguments.strategy)  # end_task may change its state
        carry, resting = self._carry, self._resting
        biases = carry.biases + resting.biases
        if resting.delta:
            carry = replace(carry, delta=carry.delta + resting.delta)
        after = strategy.end_task(self._arguments.task, carry, self.trained())
        return replace(after, biases=biases)

    def save_weights(
        self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> None:
        """One LoRA with every task so far, as our own trainer delivers it.

        Raises:
            ConfigError: a file type that can hold code.  NumericError: NaN; nothing is written.
        """
        if Path(file).suffix != ".safetensors":
            raise ConfigError(f"{file}: only .safetensors is written; set save_model_as to it.")
        header = dict(metadata or {})
        carry = self.carry_after().noting(
            **counts_of(header), rank=self._spec.rank, alpha=self._spec.alpha
        )
        adapter = portable_adapter(deliverable_adapter(carry))
        args = self._arguments
        lineage = lineage_of(
            carry, args.strategy.name, args.strategy_args, *self._named_base(header)
        )
        header = complete_header(header, adapter, lineage, len(args.parent.carry.tasks))
        write_checked_lora(file, adapter, header, dtype or torch.float32, carry.biases)
        if carry.biases:
            log.warning("%s %s", Path(file).name, BIAS_READERS)

    def _named_base(self, header: Mapping[str, str]) -> tuple[str, str]:
        """Name and hash of the base: our own identity of it, else sd-scripts' own words."""
        name, digest = named_base(header)
        if self._base is None:
            return name, digest
        return self._base.name if self._base.added else name or self._base.name, self._base.hash

    # ------------------------------------------------------------------------------ merging

    def merge_to(
        self,
        text_encoder: object,
        unet: object,
        weights_sd: Mapping[str, Tensor] | None,
        dtype: torch.dtype | None = None,
        device: object = None,
    ) -> None:
        """--base_weights: fuse a file into the models, added in fp32 and rounded once."""
        lora = self.lora or _lora_of(weights_sd)
        self.check_fits(lora.total)
        for name, entry in lora.total.weighted(self.multiplier).items():
            fuse_for_good(name, self._layers[name], entry, dtype)
        self.add_biases(lora.biases.weighted(self.multiplier))
