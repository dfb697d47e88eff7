"""`export --as peft` is read by peft itself: UNet and both text encoders of tiny-sdxl."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import fused, load_tool, modules, random_adapter

from lcp_plugin.delta import Delta
from lcp_plugin.formats.lora_file import write_lora
from lcp_plugin.formats.tensors import read_tensors
from lcp_plugin.tiny import model_dir

MODELS = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def tiny() -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(str(model_dir()))


def output(pipeline: Any, model: str, loaded: Any) -> torch.Tensor:
    """What a component makes of fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if model != "unet":
            return loaded(torch.arange(7)[None])[0]  # type: ignore[no-any-return]
        width = pipeline.unet.config.cross_attention_dim
        pooled = pipeline.text_encoder_2.config.projection_dim
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        words = torch.randn(1, 5, width, generator=generator)
        added = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.ones(1, 6)}
        return loaded(  # type: ignore[no-any-return]
            latents, torch.tensor(3), words, added_cond_kwargs=added
        ).sample


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_makes_of_every_models_folder_what_we_make_of_it(tmp_path: Path, tiny: Any) -> None:
    from peft import PeftModel

    def rank_and_alpha(i: int) -> tuple[int, float]:
        return 2 + i % 3, [1.5, 4.0, 3.0][i % 3]

    adapter = random_adapter(tiny, lambda name: True, rank_and_alpha, 0.05)
    assert len(adapter) == len(list(modules(tiny)))
    write_lora(tmp_path / "a.safetensors", adapter)
    arguments = [str(tmp_path / "a.safetensors"), "-o", str(tmp_path / "p"), "--as", "peft"]
    assert load_tool("export").main(arguments) == 0
    ours = fused(tiny, Delta.of(adapter))
    for model in MODELS:
        names = dict(getattr(tiny, model).named_modules())
        for key in read_tensors(tmp_path / "p" / model / "adapter_model.safetensors"):
            name = key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
            assert name in names, f"{key} names no module of {model}"
        part = copy.deepcopy(getattr(tiny, model))
        loaded = PeftModel.from_pretrained(part, str(tmp_path / "p" / model))
        got, wanted = (output(tiny, model, m) for m in (loaded, getattr(ours, model)))
        assert (wanted - output(tiny, model, getattr(tiny, model))).abs().max() > 0.01
        assert (got - wanted).abs().max() < 1e-5
