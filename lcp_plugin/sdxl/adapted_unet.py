"""LoRA layers and deltas on a live model: the base's own modules stay in place.

y = W x + D_branch x + scale B A x. A forward hook on each adapted layer adds the last two terms, on
a plain linear layer a forward of its own; taking it away gives back the base to the bit. In
training, W x and the factors' part are then one node of the graph (`AdaptedLinear`).

The carried delta is fused: W' = round(W_0 + D), added in fp32 and rounded once, always from
untouched weights (W + D - D is not W), which wait on the CPU meanwhile. That costs no step time and
no memory, however many tasks the chain has. A half-precision base is rounded stochastically
(`sdxl.rounding`), so that no update is lost in it. `carry_as = branch` runs D beside the weights
instead, in their type: rounded by itself, not against W (0.2% in bf16), for the time and memory of
its factors, or of one more matrix where it is dense (MagMax).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lcp_plugin.adapter import Adapter
from lcp_plugin.biases import Biases
from lcp_plugin.delta import Delta
from lcp_plugin.hooks import Conditioning, Weights
from lcp_plugin.sdxl.flat_factors import FlatFactors
from lcp_plugin.sdxl.layers import check_fits, find_layers, weight_of
from lcp_plugin.sdxl.live_biases import LiveBiases
from lcp_plugin.sdxl.rounding import FuseError
from lcp_plugin.sdxl.sites import LoraPair, Site


class AdaptedUNet(nn.Module):
    """A pipeline's UNet (and text encoders) with deltas and one adapter attached by hooks.

    As a module it holds the UNet and the adapter's factors, so that it can be prepared for several
    processes; `forward` is the UNet's.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.unet = components["unet"]
        self.layers = find_layers(components)
        self.biases = LiveBiases(self.layers)
        self.pairs = nn.ModuleDict()
        self._sites: dict[str, Site] = {}
        self._base = Delta()
        self._start = Adapter()
        self._carry = Delta()
        self._set: tuple[str, dict[str, float]] | None = None  # how the base was last set
        self.pair_of: dict[str, LoraPair] = {}
        self.flat: FlatFactors | None = None  # the UNet's factors
        self.plain = False  # the base computes in its own type: no autocast
        self.shares_casts = True  # the factors are cast once a step, for all layers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The UNet, adapted."""
        self._round_factors()
        if not self.plain:
            return self.unet(*args, **kwargs)
        with torch.autocast(str(self.unet.device.type), enabled=False):
            return self.unet(*args, **kwargs)

    def _round_factors(self) -> None:
        """The factors as they are now, in the type that a half-precision base computes in."""
        if self.flat is None or not (self.training and self.shares_casts):
            return
        names = [name for name in self.pair_of if name.startswith("unet.")]
        dtype = self._sites[names[0]].weight.dtype
        if dtype is self.flat.values.dtype:
            return
        views = iter(self.flat.rounded(dtype))
        for name in names:
            self.pair_of[name].rounded = next(views), next(views)

    def forget_rounded(self) -> None:
        """Frees what `forward` cast: the factors are about to change."""
        for pair in self.pair_of.values():
            pair.rounded = None

    def _site(self, name: str) -> Site:
        if name not in self._sites:
            self._sites[name] = Site(name, self.layers[name])
        return self._sites[name]

    @property
    def changes_texts(self) -> bool:
        """Whether the base delta, or a change of biases, reaches into a text encoder."""
        changed = (*self._base, *self.biases.changes)
        return any(name.startswith("text_encoder") for name in changed)

    def set_base(
        self, delta: Delta, carry_as: str = "auto", measure: bool = True
    ) -> dict[str, float]:
        """Puts the model on W_0 + delta, frozen.

        Returns:
            fused, branched: numbers of layers, and `FuseError.shares` over all of them.
        Raises:
            LineageError: a module or shape that the base does not have.
        """
        if delta is self._base and self._set is not None and self._set[0] == carry_as:
            return dict(self._set[1])  # as a boundary leaves it for the next task
        self.check_fits(delta)
        error, fuses = FuseError(), carry_as != "branch"
        for name, site in self._sites.items():
            if not fuses or name not in delta:  # the others are fused anew from what waits
                site.restore()
        self._base = delta
        for name, entry in delta.items():
            site = self._site(name)
            part = site.fuse(entry, measure) if fuses else site.set_branch(entry, measure)
            error = error + part
        fused = len(delta) if fuses else 0
        facts = {"fused": fused, "branched": len(delta) - fused, **error.shares()}
        self._set = (carry_as, facts) if measure else None
        return dict(facts)

    def check_fits(self, values: Mapping[str, Any]) -> None:
        """Raises LineageError if a delta or adapter has a module or shape that the base lacks."""
        check_fits(self.layers, values)

    def attach(
        self,
        adapter: Adapter,
        trainable: frozenset[str] = frozenset({"A", "B"}),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Puts the adapter's factors on the layers as parameters, on each layer's device."""
        self.check_fits(adapter)
        self.detach()
        self._start = adapter
        for name, factors in adapter.items():
            site = self._site(name)
            pair = LoraPair(factors, trainable, dtype).to(site.weight.device)
            site.pair = self.pair_of[name] = pair
            self.pairs[name.replace(".", "/")] = pair
        pairs = [pair for name, pair in self.pair_of.items() if name.startswith("unet.")]
        parameters = [parameter for pair in pairs for parameter in (pair.down, pair.up)]
        self.flat = FlatFactors(parameters) if parameters else None

    def detach(self) -> None:
        """Takes the adapter off."""
        for name in self.pair_of:
            self._sites[name].pair = None
        self.pair_of, self.flat = {}, None
        self.pairs = nn.ModuleDict()

    def trained(self) -> Adapter:
        """The factors as they are now, as a value."""
        return Adapter({name: pair.factors() for name, pair in self.pair_of.items()})

    def set_carry(self, total: Delta) -> None:
        """What `using("carry")` shows: W_0 + total. Raises LineageError where that does not fit."""
        self.check_fits(total)
        self._carry = total

    def base_delta(self, name: str) -> Tensor | None:
        """The frozen base delta of a layer on its device, (out, in); None where it is zero."""
        if name not in self._base:
            return None
        return self._base[name].dense().to(weight_of(self.layers[name]).device)

    @contextmanager
    def using(self, weights: Weights) -> Iterator[None]:
        """The model under other weights for a while: "trained", "start", "carry" or "base"."""
        if weights == "trained":
            yield
            return
        if weights == "carry" and self._carry is self._base:
            with self._without_pairs():
                yield
            return
        shown = {"base": Delta(), "carry": self._carry}.get(weights)
        with self._without_pairs(), self.biases.away() if weights == "base" else nullcontext():
            if shown is not None:
                with self._showing(shown):
                    yield
            else:
                with self._beside(Delta.of(self._start)):  # pairs stay away until it ends
                    yield

    @contextmanager
    def _without_pairs(self) -> Iterator[None]:
        pairs = {name: site.pair for name, site in self._sites.items()}
        try:
            for site in self._sites.values():
                site.pair = None
            yield
        finally:
            for name, pair in pairs.items():
                self._sites[name].pair = pair

    @contextmanager
    def _showing(self, delta: Delta) -> Iterator[None]:
        """Untouched weights with `delta` beside them; fused weights come back unchanged after."""
        for name in delta:
            self._site(name)  # a carry may change layers that this task does not
        kept = {name: (site.weight.data, site.branch) for name, site in self._sites.items()}
        try:
            for name, site in self._sites.items():
                if site.untouched is not None:
                    site.weight.data = site.untouched.to(site.weight.device)
                site.set_branch(delta.get(name))
            yield
        finally:
            for name, (data, branch) in kept.items():
                self._sites[name].weight.data = data
                self._sites[name].branch = branch

    @contextmanager
    def _beside(self, delta: Delta) -> Iterator[None]:
        """The base of the task with `delta` in the adapter's place."""
        try:
            for name, entry in delta.items():
                site = self._sites[name]
                factors = Delta({name: entry}).factors(name)
                pair = LoraPair(factors, frozenset(), torch.float32).to(site.weight.device)
                site.pair = pair.eval()
            yield
        finally:
            for name in delta:
                self._sites[name].pair = None

    def release(self) -> None:
        """Takes every hook, branch and fused weight away: the base, to the bit."""
        self.detach()
        for site in self._sites.values():
            site.remove()
        self._sites, self._set = {}, None
        self.biases.set(Biases())
        self._base = self._carry = Delta()


def run_unet(
    unet: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, dtype: torch.dtype
) -> Tensor:
    """The UNet's output in fp32 for noisy latents (b, 4, h, w) at timesteps (b,).

    Args:
        conditioning: encoder_hidden_states (b, tokens, c), text_embeds (b, d), time_ids (b, 6).
        dtype: of the UNet's weights; inputs are cast to it.
    """
    output = unet(
        latents.to(dtype),
        timesteps,
        encoder_hidden_states=conditioning["encoder_hidden_states"].to(dtype),
        added_cond_kwargs={
            "text_embeds": conditioning["text_embeds"].to(dtype),
            "time_ids": conditioning["time_ids"].to(dtype),
        },
        return_dict=False,
    )[0]
    return torch.as_tensor(output).float()
