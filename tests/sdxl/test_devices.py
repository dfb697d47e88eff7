"""Where CUDA, Apple's GPUs and the CPU differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from no_float64 import META, NoFloat64
from torch import nn

from lcp_plugin.delta import Dense
from lcp_plugin.errors import ConfigError
from lcp_plugin.run import opening, runner
from lcp_plugin.sdxl import devices, stored
from lcp_plugin.sdxl.devices import choose_device, is_out_of_memory, own_randomness, widen
from lcp_plugin.sdxl.fitting import in_batches
from lcp_plugin.sdxl.load import load_pipeline
from lcp_plugin.sdxl.precision import peak_memory_mb
from lcp_plugin.sdxl.sites import Site


@pytest.mark.parametrize(("told", "threads"), [(None, 1), ("2", 2)])
def test_a_small_base_takes_one_thread_unless_told_otherwise(
    toy_base: Path, monkeypatch: pytest.MonkeyPatch, told: str | None, threads: int
) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    try:
        torch.set_num_threads(2)
        load_pipeline(str(toy_base))
        assert torch.get_num_threads() == threads
        torch.set_num_threads(2)
        devices.calm_threads(2_567_463_684)  # SDXL's UNet
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Trained(Exception):
    """The task's steps are done."""


def test_a_run_puts_no_float64_on_a_device_that_has_none(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = opening.create_accelerator

    def on_meta(*given: Any, **more: Any) -> Any:
        accelerator = real(*given, **more)
        accelerator.state._shared_state["device"] = META
        return accelerator

    monkeypatch.setattr(opening, "create_accelerator", on_meta)

    def end(*_: Any) -> None:
        raise Trained

    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": enabled("cpu"))
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", frozenset({"mps", "meta"}))
    monkeypatch.setattr(runner, "end_lesson", end)
    settings = {"loss_type": "smooth_l1", "huber_schedule": "snr", "min_snr_gamma": 5.0}
    with NoFloat64() as device, pytest.raises(Trained):
        train("meta", (0,), optimizer_type="SGDNesterov", **settings)
    assert device.calls > 1000


def test_a_boundary_copies_a_weight_once_and_adds_up_over_two_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", frozenset({"mps", "meta"}))
    here, there = (Site("x", nn.Linear(5, 4, device=device)) for device in ("cpu", META))
    entry = Dense(torch.ones(4, 5))
    with NoFloat64():
        for first, second in ((here, there), (there, here)):
            error = first.fuse(entry, measure=True) + second.fuse(entry, measure=True)
            assert error.shares()["rounding_share"] < 1e-6
        kept = there.untouched
        there.restore()
        there.fuse(entry, measure=False)
    assert kept is not None
    assert kept.device.type == "cpu"
    assert there.untouched is kept


def test_sums_are_taken_in_the_widest_type_of_a_device() -> None:
    assert widen(torch.ones(2)).dtype is torch.float64
    assert devices.widest_float(torch.device("mps")) is torch.float32


def test_a_gpu_is_chosen_where_torch_can_use_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cuda, mps in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        found.append(choose_device())
    assert found == ["cuda", "mps", "cpu"]
    assert choose_device("cpu:0") == "cpu:0"
    with pytest.raises(ConfigError, match="device 'nowhere' is not to be had here"):
        choose_device("nowhere")


def test_the_random_state_of_mps_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    put_back = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.ones(1))
    monkeypatch.setattr(torch.mps, "set_rng_state", put_back.append)
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="inside"), own_randomness(torch.device("mps"), 3):
        raise ValueError("inside")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [state.item() for state in put_back] == [1]


def test_a_batch_too_large_for_mps_is_halved_as_for_cuda() -> None:
    tried = []

    def work(start: int, stop: int) -> torch.Tensor:
        tried.append(stop - start)
        if stop - start > 1:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)")
        return torch.zeros(stop - start)

    assert len(in_batches("of this test", 4, work)) == 4
    assert tried == [4, 2, 1, 1, 1, 1]
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_memory_of_mps_is_what_its_driver_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * 2**20)
    assert peak_memory_mb(torch.device("mps")) == 3


def test_no_half_precision_is_native_to_a_torch_without_mkldnn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    natives = [stored.is_native(d) for d in (torch.bfloat16, torch.float16, torch.float32)]
    assert natives == [False, False, True]
