"""The plan of a dry run, and its estimates against SDXL's own shapes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_unets import sdxl_unet

from lcp_plugin.config.estimates import (
    ATTENTION_SHAPES,
    TRANSFORMER_SHAPES,
    UNET_PARAMETERS,
    count_factors,
)
from lcp_plugin.config.load import load_config
from lcp_plugin.config.options import Options
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.run.forecast import describe_plan, estimate_run


def test_the_shapes_are_those_of_sdxls_unet() -> None:
    unet = sdxl_unet()
    assert sum(p.numel() for p in unet.parameters()) == UNET_PARAMETERS
    attention, transformer = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attentions." in name:
            shape = tuple(module.weight.shape)
            transformer[shape] += 1
            attention[shape] += name.endswith(("to_q", "to_k", "to_v", "to_out.0"))

    def counted(shapes: tuple[tuple[int, int, int], ...]) -> Counter[tuple[int, ...]]:
        total = Counter[tuple[int, ...]]()
        for count, out, inputs in shapes:
            total[(out, inputs)] += count
        return total

    assert counted(ATTENTION_SHAPES) == +attention
    assert counted(TRANSFORMER_SHAPES) == transformer


def test_a_rank_64_adapter_has_the_papers_number_of_parameters() -> None:
    assert count_factors(ATTENTION_SHAPES, 64) == pytest.approx(92.9e6, rel=1e-3)


def test_estimates_move_the_way_they_should() -> None:
    def vram(**given: object) -> float:
        options = Options(**{"network_dim": 64, "network_train_unet_only": True, **given})
        return estimate_run(options, 100, 2, 1024**2).vram_gb

    assert vram(mixed_precision="bf16") < vram()
    assert vram(gradient_checkpointing=True) < vram()
    assert vram(fp8_base_unet=True) < vram()
    assert vram(cache_text_encoder_outputs=True) < vram()
    assert vram(optimizer_type="AdamW8bit") < vram()
    assert vram(train_batch_size=2) > vram()


def test_the_8gb_preset_is_estimated_below_8_gb(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    flags = ["--pretrained_model_name_or_path", "x", "--train_data_dir", str(tmp_path)]
    for preset, limit in (("8gb", 8), ("12gb", 12), ("24gb", 24)):
        options = load_config([*flags, "--preset", preset, "--network_dim", "16"]).options
        assert estimate_run(options, 100, 1, 1024**2).vram_gb < limit


def test_the_carry_grows_with_tasks_until_it_is_dense() -> None:
    options = Options(network_dim=64, resume_every_n_steps=0)
    one, two, many = (estimate_run(options, 1, n, 1).disk_gb for n in (1, 2, 100))
    adapter = 4 * count_factors(ATTENTION_SHAPES, 64) / 1e9
    assert one == pytest.approx(3 * adapter)
    assert two == pytest.approx(6 * adapter)
    dense = 4 * 955_187_200 / 1e9  # SDXL's 560 attention projections
    assert many == pytest.approx(100 * adapter + 2 * dense)


def test_the_plan_tells_options_with_their_source_and_every_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (40, 32), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "run.toml").write_text(
        'pretrained_model_name_or_path = "tiny-sdxl"\nwandb_api_key = "secret"\n'
        'clip_skip = 2\n[[tasks]]\nname = "a"\nconcept = "sks a"\nimage_dir = "a"\n'
        '[[tasks]]\nname = "b"\nimage_dir = "b"\nmax_train_steps = 5\n'
    )
    config = load_config(["--config", "run", "--learning_rate", "1e-4"])
    tasks = [(t, TaskData(t, 0, i, (32, 32))) for i, t in enumerate(config.tasks, 1)]
    plan = describe_plan(config, tasks, native=32)
    assert "learning_rate" in plan
    assert "0.0001" in plan
    assert "command line" in plan
    assert "secret" not in plan
    assert "1. a (object 'sks a'): 1600 steps" in plan
    assert "images: 3, 3 with repeats, in 3 batches an epoch" in plan
    assert "32x32: 3" in plan
    assert "'a photo of sks a'" in plan
    assert "of its own: max_train_steps = 5" in plan
    assert "1605 steps in all" in plan
    assert "Estimates" in plan
    assert "clip_skip has no effect" in plan
