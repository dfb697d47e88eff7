"""A run depends on its config and its data: neither on global generators, workers nor a network."""

from __future__ import annotations

import pickle
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from toy_runs import assert_equal_tensors, draw_two, read_all, read_samples, write_run

from lcp_plugin.cli import main
from lcp_plugin.store.run_folder import RunStore

DRAWING: dict[str, Any] = {  # all that draws random numbers
    "cache_latents": False,
    "random_crop": True,
    "flip_aug": True,
    "cache_text_encoder_outputs": False,
    "caption_dropout_rate": 0.3,
    "network_dropout": 0.2,
    "noise_offset": 0.05,
    "noise_offset_random_strength": True,
    "ip_noise_gamma": 0.05,
    "network_dim": 4,
    "samples_per_task": 1,
    "sample_steps": 2,
    "resume_every_n_steps": 2,
}
Noted = dict[str, list[str]]


@pytest.fixture(scope="module")
def noted() -> Noted:
    """What the run under watch connected to, and which functions of pickle it called."""
    return {"network": [], "pickle": []}


@pytest.fixture(scope="module")
def _watched(noted: Noted) -> Iterator[None]:
    """No network, no word that there is none, and no pickle."""

    reach = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX:  # a data loader's workers, on this machine
            return reach(self, address)
        noted["network"].append(str(address))
        raise OSError("no network in this test")

    def look_up(host: Any, *_: Any, **__: Any) -> None:
        noted["network"].append(str(host))
        raise OSError("no network in this test")

    def refuse(name: str) -> Callable[..., None]:
        def call(*_: Any, **__: Any) -> None:
            noted["pickle"].append(name)
            raise AssertionError(f"{name} was called")

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(socket.socket, "connect", connect)
        patch.setattr(socket, "getaddrinfo", look_up)
        for module, name in (
            *((pickle, name) for name in ("dump", "dumps", "load", "loads")),
            *((torch, name) for name in ("save", "load")),
        ):
            patch.setattr(module, name, refuse(f"{module.__name__}.{name}"))
        yield


@pytest.fixture(scope="module")
def pair(
    toy_base: Path, tmp_path_factory: pytest.TempPathFactory, _watched: None
) -> tuple[RunStore, RunStore]:
    """One config twice: as it is, and with other global generators and with two workers."""
    stores = []
    for seed, workers in ((1, 0), (2, 2)):
        folder = tmp_path_factory.mktemp(f"workers{workers}")
        given = {**DRAWING, "max_data_loader_n_workers": workers}
        config = write_run(folder, toy_base, draw_two(folder / "data"), "run", **given)
        random.seed(seed)
        torch.manual_seed(seed)
        assert main(["--config", str(config)]) == 0
        stores.append(RunStore(folder / "out", "run"))
    return stores[0], stores[1]


def test_neither_global_generators_nor_workers_change_what_is_learned_and_drawn(
    pair: tuple[RunStore, RunStore],
) -> None:
    one, other = pair
    assert_equal_tensors(read_all(one), read_all(other))
    assert read_samples(one) == read_samples(other)
    assert len(read_samples(one)) == 1 + 2 + 1 + 2  # the grid, the base, and what each stage knows


@pytest.mark.usefixtures("pair")
def test_a_run_asks_nothing_of_a_network(noted: Noted) -> None:
    assert noted["network"] == []


@pytest.mark.usefixtures("pair")
def test_a_run_with_its_states_pickles_nothing(noted: Noted) -> None:
    assert noted["pickle"] == []
