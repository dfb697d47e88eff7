"""Options about attention and processes: honoured, and what they cost or overrule is said."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import COMMON, launch

from lcp_plugin.config.load import load_config
from lcp_plugin.config.options import Options
from lcp_plugin.observers.jsonl import read_steps
from lcp_plugin.sdxl.load import load_pipeline
from lcp_plugin.sdxl.precision import choose_attention, use_attention
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.training.processes import create_accelerator, describe_processes

Train = Callable[..., Any]
WriteConfig = Callable[..., Path]


def notices_of(config: Path, *flags: str) -> str:
    return "\n".join(load_config(["--config", str(config), *flags]).notices)


@pytest.mark.parametrize(
    ("given", "kind", "processor"),
    [
        ({}, "sdpa", "AttnProcessor2_0"),
        ({"sdpa": False}, "plain", "AttnProcessor"),
        ({"sdpa": False, "mem_eff_attn": True}, "sdpa", "AttnProcessor2_0"),
    ],
)
def test_attention_is_the_one_asked_for(
    toy_base: Path, given: dict[str, Any], kind: str, processor: str
) -> None:
    unet = load_pipeline(str(toy_base)).unet
    assert use_attention(unet, choose_attention(Options(**given))) == kind
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {processor}


def test_a_run_without_sdpa_learns_the_same_up_to_rounding(train: Train) -> None:
    runs = [train(name, tasks=(0,), sdpa=sdpa) for name, sdpa in (("a", True), ("b", False))]
    losses = [[s["loss"] for s in read_steps(r.store.root / "logs" / "steps.jsonl")] for r in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    kinds = {type(p).__name__ for p in runs[1].base.pipeline.unet.attn_processors.values()}
    assert kinds == {"AttnProcessor"}


def test_what_plain_attention_costs_is_said(write_config: WriteConfig) -> None:
    config = write_config("run")
    assert "sdpa = false: attention by plain matrix products" in notices_of(
        config, "--sdpa", "false"
    )
    assert "sdpa" not in notices_of(config)
    assert "sdpa = false" not in notices_of(config, "--xformers")


@pytest.mark.parametrize("flag", ["--fp8_base", "--fp8_base_unet"])
def test_a_carry_that_float8_does_not_take_is_said(write_config: WriteConfig, flag: str) -> None:
    config = write_config("run")
    found = notices_of(config, flag, "--carry_as", "fuse")
    assert "carry_as = fuse does not hold with fp8_base" in found
    assert "carry_as" not in notices_of(config, flag)
    assert "carry_as" not in notices_of(config, "--carry_as", "fuse")


def test_ddp_options_reach_accelerate() -> None:
    (plain,) = describe_processes(Options())
    assert (plain.gradient_as_bucket_view, plain.static_graph) == (False, False)
    given = Options(ddp_timeout=7, ddp_gradient_as_bucket_view=True, ddp_static_graph=True)
    sharing, group = describe_processes(given, some_unused=True)
    assert (sharing.gradient_as_bucket_view, sharing.static_graph) == (True, True)
    assert sharing.find_unused_parameters
    assert group.timeout == timedelta(minutes=7)
    accelerator = create_accelerator("no", options=given)
    assert accelerator.ddp_handler.static_graph
    assert accelerator.init_handler.timeout == timedelta(minutes=7)


def test_a_static_graph_is_set_aside_where_the_graph_changes(write_config: WriteConfig) -> None:
    flags = ["--config", str(write_config("run")), "--ddp_static_graph"]
    assert load_config(flags).options.ddp_static_graph
    found = load_config([*flags, "--network_args", "module_dropout=0.1"])
    assert not found.options.ddp_static_graph
    assert any("ddp_static_graph is set aside" in notice for notice in found.notices)


def test_two_processes_with_ddp_options_learn_what_one_learns_with_twice_the_accumulation(
    write_config: WriteConfig, train: Train, tmp_path: Path
) -> None:
    common = {"tasks": (0,), **COMMON, "optimizer_type": "SGD", "learning_rate": 0.1}
    ddp = {"ddp_timeout": 5, "ddp_gradient_as_bucket_view": True, "ddp_static_graph": True}
    launch(write_config("ddp", **common, gradient_accumulation_steps=2, **ddp))
    ours = RunStore(tmp_path / "out", "ddp").folders()[0].read_adapter()
    run = train("one", **common, gradient_accumulation_steps=4)
    one = run.store.folders()[0].read_adapter()
    assert any(bool(f.up.abs().max() > 1e-4) for f in one.values())
    for name, factors in one.items():
        torch.testing.assert_close(ours[name].up, factors.up, rtol=0, atol=1e-5)
