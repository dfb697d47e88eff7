"""A replacement VAE's own scaling holds in training, in the scores and in the samples."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lcp_plugin.evaluation.mirrors import encode_files
from lcp_plugin.formats.disk import read_json, write_json
from lcp_plugin.sdxl.drawing import decode_latents

SCALINGS = [
    {"scaling_factor": 0.2},
    {"scaling_factor": 0.2, "shift_factor": 0.5},
    {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [0.5, 1, 2, 3]},
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaling_is_the_same_in_training_scores_and_samples(
    train: Callable[..., Any],
    toy_base: Path,
    tmp_path: Path,
    pictures: Path,
    scaling: dict[str, Any],
) -> None:
    shutil.copytree(toy_base / "vae", tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    write_json(config, {**read_json(config), **scaling})
    run = train("run", tasks=(0,), max_train_steps=1, vae=str(tmp_path / "vae"))
    pipeline = run.base.pipeline
    scored = encode_files(run.base, sorted((pictures / "disc0").iterdir()))
    raw = scored / scaling["scaling_factor"]
    if "latents_std" in scaling:
        raw = raw * torch.tensor(scaling["latents_std"]).view(1, -1, 1, 1)
    mean = torch.tensor(scaling.get("latents_mean", [scaling.get("shift_factor", 0.0)]))
    raw = raw + mean.view(1, -1, 1, 1)
    with torch.no_grad():
        wanted = pipeline.vae.decode(raw).sample
    shown = pipeline.image_processor.postprocess(wanted, output_type="pil")
    drawn = decode_latents(pipeline, scored)
    assert [
        abs(a - b) <= 1
        for x, y in zip(shown, drawn, strict=True)
        for a, b in zip(x.tobytes(), y.tobytes(), strict=True)
    ].count(False) == 0
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    pixels = torch.rand(1, 3, side, side) * 2 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mode()
    trained = run.base.encode_images(pixels)
    back = trained / scaling["scaling_factor"]
    if "latents_std" in scaling:
        back = back * torch.tensor(scaling["latents_std"]).view(1, -1, 1, 1)
    assert torch.allclose(back + mean.view(1, -1, 1, 1), latents, atol=1e-4)
