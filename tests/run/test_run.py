"""Whole runs on a toy base: delivering, samples, training options."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toy_runs import STRATEGIES, under

from lcp_plugin.formats.tensors import read_header
from lcp_plugin.sdxl.adapted_unet import run_unet

Train = Callable[..., Any]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_deliverable_in_diffusers_does_what_the_model_after_the_boundary_does(
    train: Train, toy_base: Path, strategy: str
) -> None:
    from diffusers import StableDiffusionXLPipeline

    run = train("run", tasks=(0, 1), **under(strategy), max_train_steps=8, network_alpha=1)
    base = run.base
    base.show(run.store.folders()[-1].read_carry().change)
    batch = {
        "encoder_hidden_states": torch.randn(1, 77, base.pipeline.unet.config.cross_attention_dim),
        "text_embeds": torch.randn(1, base.pipeline.text_encoder_2.config.projection_dim),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    }
    latents, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        ours = run_unet(base.adapted, latents, timesteps, batch, torch.float32)
    fresh = StableDiffusionXLPipeline.from_pretrained(toy_base)
    with torch.no_grad():
        before = run_unet(fresh.unet, latents, timesteps, batch, torch.float32)
    fresh.load_lora_weights(str(run.store.deliverable))
    with torch.no_grad():
        theirs = run_unet(fresh.unet, latents, timesteps, batch, torch.float32)
    assert float((ours - before).abs().max()) > 1e-2  # something was learned
    assert float((ours - theirs).abs().max()) < 1e-4


def test_bounds_are_runs_too(train: Train) -> None:
    joint = train("joint", tasks=(0, 1), strategy="joint")
    (folder,) = joint.store.folders()
    assert [r.name for r in folder.records] == ["disc0", "disc1"]
    assert folder.lineage["training"]["steps"] == 6
    alone = train("alone", tasks=(0, 1), strategy="independent")
    end = train("end", tasks=(0, 1), strategy="merge_at_end")
    first, second = (f.read_adapter() for f in alone.store.folders())
    both = [f.read_adapter() for f in end.store.folders()]
    name = next(iter(first))
    assert torch.equal(both[1][name].up, second[name].up)  # trained without the first
    total = end.store.folders()[-1].read_carry().total[name].dense().double()
    expected = sum(f[name].up.double() @ f[name].down.double() for f in (first, second))
    assert torch.allclose(total, expected, atol=1e-6)


def test_samples_and_grid_are_written_for_every_stage(train: Train) -> None:
    run = train("run", tasks=(0, 1), samples_per_task=2, sample_steps=2)
    found = sorted(
        p.relative_to(run.store.root / "samples").as_posix()
        for p in (run.store.root / "samples").rglob("*.png")
    )
    stages = {"00_base": (0, 1), "01_disc0": (0,), "02_disc1": (0, 1)}
    wanted = [f"{s}/disc{t}_{i}.png" for s, tasks in stages.items() for t in tasks for i in (0, 1)]
    assert found == sorted([*wanted, "grid.png"])
    with Image.open(run.store.root / "samples" / "02_disc1" / "disc0_0.png") as image:
        assert image.info["prompt"] == "a photo of sks0 disc"


def test_order_seed_shuffles_as_the_paper_does(train: Train) -> None:
    run = train("run", tasks=(0, 1, 2, 3), order_seed=5, max_train_steps=1)
    names = [f"disc{i}" for i in range(4)]
    random.seed(5)
    random.shuffle(names)
    assert [f.name for f in run.store.folders()] == names


def test_text_encoders_train_chain_and_survive_a_unet_only_continuation(train: Train) -> None:
    first = train(
        "first",
        tasks=(0,),
        network_train_unet_only=False,
        cache_text_encoder_outputs=False,
        text_encoder_lr=[1e-2, 2e-2],
    )
    adapter = first.store.folders()[0].read_adapter()
    parts = {name.split(".")[0] for name in adapter}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}
    untrained = {n.rpartition(".layers.")[0] for n, f in adapter.items() if not f.up.any()}
    assert untrained <= {
        "text_encoder.text_model.encoder"
    }  # its last layer: SDXL reads the one before
    for strategy in ("naive", "merge_init"):
        second = train(
            f"second_{strategy}",
            tasks=(1,),
            prev=str(first.store.deliverable),
            strategy=strategy,
            allow_strategy_change=True,
        )
        total = second.store.folders()[-1].read_carry().total
        for name, factors in adapter.items():
            if not name.startswith("unet."):
                assert torch.allclose(total[name].dense(), factors.update(), atol=1e-7)
        delivered = read_header(second.store.deliverable).tensors
        assert any(key.startswith("lora_te1_") for key in delivered)
        assert any(key.startswith("lora_te2_") for key in delivered)


def test_xformers_missing_is_one_warning_and_sdpa(
    train: Train, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "xformers", None)
    train("run", tasks=(0, 1), xformers=True)
    assert [r.message for r in caplog.records if "xformers" in r.message] == [
        r.message for r in caplog.records if "SDPA instead" in r.message
    ]
    assert sum("SDPA instead" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "full_bf16": True},
        {"optimizer_type": "AdamW8bit"},
        {"optimizer_type": "PagedAdamW8bit"},
        {"optimizer_type": "Lion8bit"},
        {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]},
        {"optimizer_type": "torch.optim.RMSprop"},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
        {"v_parameterization": True},
        {"lora_targets": "transformer"},
        {"cache_latents": False, "cache_text_encoder_outputs": False},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_training_options_train(train: Train, options: dict[str, Any]) -> None:
    run = train("run", tasks=(0, 1), strategy="magmax", **options)
    for folder in run.store.folders():
        assert any(bool(f.up.abs().max() > 0) for f in folder.read_adapter().values())
    if "optimizer_type" in options:
        used = run.store.folders()[0].lineage["training"]["optimizer"]
        assert options["optimizer_type"].split(".")[-1] in used


def test_gradient_checkpointing_changes_nothing_but_memory(train: Train) -> None:
    plain = train("plain", tasks=(0,))
    saving = train("saving", tasks=(0,), gradient_checkpointing=True)
    a, b = (r.store.folders()[0].read_adapter() for r in (plain, saving))
    for name in a:
        assert torch.allclose(a[name].up, b[name].up, atol=1e-6)
