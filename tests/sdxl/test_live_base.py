"""The base as loaded: what it shows is what it draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lcp_plugin.biases import Change
from lcp_plugin.delta import Delta, Dense
from lcp_plugin.sdxl.base_weights import BaseSource
from lcp_plugin.sdxl.drawing import DrawSettings, starting_latents
from lcp_plugin.sdxl.layers import layer_shape
from lcp_plugin.sdxl.live_base import LiveBase
from lcp_plugin.sdxl.open_base import open_base


@pytest.fixture
def base(toy_base: Path) -> LiveBase:
    return open_base(BaseSource(str(toy_base)), torch.device("cpu"))


def draw(base: LiveBase) -> NDArray[np.uint8]:
    latents = starting_latents(base.pipeline, 1, (32, 32), seed=3)
    (image,) = base.draw(["a disc"], latents, DrawSettings(steps=2, guidance=2.0))
    return np.asarray(image)


def change_of(base: LiveBase, part: str) -> Delta:
    """A dense change of every layer of a part."""
    generator, layers = torch.Generator().manual_seed(1), base.adapted.layers
    return Delta(
        {
            name: Dense(torch.randn(layer_shape(layer), generator=generator))
            for name, layer in layers.items()
            if name.startswith(f"{part}.")
        }
    )


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_images_follow_a_delta_that_changes_a_text_encoder(base: LiveBase, part: str) -> None:
    change, plain = change_of(base, part), draw(base)
    base.show(Change(change))
    changed = draw(base)
    base.bank.clear()
    np.testing.assert_array_equal(draw(base), changed)
    base.show(Change())
    np.testing.assert_array_equal(draw(base), plain)
    assert not np.array_equal(plain, changed)


def test_prompts_stay_encoded_while_only_the_unet_changes(base: LiveBase) -> None:
    draw(base)
    known = base.bank(["a disc"])["text_embeds"]
    base.show(Change(change_of(base, "unet")))
    assert torch.equal(base.bank(["a disc"])["text_embeds"], known)
