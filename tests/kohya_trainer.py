"""A stand-in for sd-scripts' trainer, which calls the network_module in its order."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lcp_plugin.formats.keys import to_sgm
from lcp_plugin.kohya import ContinualNetwork, create_network
from lcp_plugin.tasks import TaskRecord

BOOTS = TaskRecord(1, "boots", "object", "zwz boots")


class Trainer:
    """Calls the network as sd-scripts' train_network.py does, in its order."""

    def __init__(
        self,
        pipeline: Any,
        network_args: dict[str, str],
        unet_only: bool = True,
        network_weights: str | None = None,
        sgm: bool = False,
        dim_from_weights: bool = False,
        base_weights: tuple[str, ...] = (),
    ) -> None:
        self.pipeline = pipeline
        self.unet = sgm_view(pipeline.unet) if sgm else pipeline.unet
        self.text = [pipeline.text_encoder, pipeline.text_encoder_2]
        for model in (pipeline.unet, *self.text):
            model.requires_grad_(False)
        module = importlib.import_module("lcp_plugin.kohya")
        for file in base_weights:
            merged, weights = module.create_network_from_weights(
                1.0, file, None, self.text, self.unet, for_inference=True
            )
            merged.merge_to(self.text, self.unet, weights, torch.float32, "cpu")
        if dim_from_weights:
            network, _ = module.create_network_from_weights(
                1, network_weights, None, self.text, self.unet, **network_args
            )
        else:
            network = module.create_network(
                1.0, 4, 2.0, None, self.text, self.unet, neuron_dropout=None, **network_args
            )
        self.network: ContinualNetwork = network
        network.prepare_network(SimpleNamespace())
        network.set_multiplier(1.0)
        network.apply_to(self.text, self.unet, not unet_only, True)
        if network_weights:
            network.load_weights(network_weights)
        network.enable_gradient_checkpointing()
        groups, self.names = network.prepare_optimizer_params(None if unet_only else 1e-3, 1e-2, 1)
        self.optimizer = torch.optim.SGD(groups)
        network.prepare_grad_etc(self.text, self.unet)

    def train(self, steps: int = 2) -> Trainer:
        """A few steps of noise prediction on nothing in particular."""
        self.network.on_epoch_start(self.text, self.unet)
        for step in range(steps):
            self.network.on_step_start(self.text, self.unet)
            self.predict(step).square().mean().backward()
            nn.utils.clip_grad_norm_(self.network.get_trainable_params(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.network.eval()
        return self

    def predict(self, seed: int = 0) -> Tensor:
        return predict(self.pipeline, seed)

    def save(self, path: Path, dtype: torch.dtype | None = None) -> Path:
        metadata = {"ss_sd_model_name": "toy", "ss_steps": "2", "ss_network_dim": "4"}
        self.network.save_weights(str(path), dtype, metadata)
        return path


def predict(pipeline: Any, seed: int = 0) -> Tensor:
    """The UNet's prediction for a prompt that both text encoders read."""
    generator = torch.Generator().manual_seed(seed)
    unet = pipeline.unet
    ids = torch.randint(3, 40, (1, 8), generator=generator)
    one = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    two = pipeline.text_encoder_2(ids, output_hidden_states=True)
    states = torch.cat([one, two.hidden_states[-2]], dim=-1)
    size = unet.config.sample_size
    latents = torch.randn(1, 4, size, size, generator=generator)
    conditions = {"text_embeds": two.text_embeds, "time_ids": torch.ones(1, 6)}
    weight = unet.conv_in.weight
    return unet(
        latents.to(weight),
        torch.tensor([300]),
        states.to(weight),
        added_cond_kwargs={k: v.to(weight) for k, v in conditions.items()},
    ).sample


def sgm_view(unet: nn.Module) -> nn.Module:
    """The UNet's layers under the names that sd-scripts' own class gives them."""
    root = nn.Module()
    for name, layer in unet.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        *path, last = to_sgm(name).split(".")
        place = root
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, layer)
    return root


def make(toy: Any, **network_args: str) -> ContinualNetwork:
    return create_network(1.0, 4, 2.0, None, [toy.text_encoder], toy.unet, None, **network_args)
