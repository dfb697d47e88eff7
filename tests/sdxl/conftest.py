"""The toy base's UNet, as it is and adapted."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
from torch import nn

from lcp_plugin.sdxl.adapted_unet import AdaptedUNet


@pytest.fixture(scope="module")
def toy_unet() -> nn.Module:
    """The toy base's UNet in fp32: never changed, tests adapt copies."""
    from lcp_plugin.sdxl.load import hush_libraries
    from lcp_plugin.tiny.architecture import build_toy

    hush_libraries()
    unet: nn.Module = build_toy().unet
    return unet.requires_grad_(False)


@pytest.fixture
def unet(toy_unet: nn.Module) -> nn.Module:
    return copy.deepcopy(toy_unet)


@pytest.fixture
def adapted(unet: nn.Module) -> Iterator[AdaptedUNet]:
    model = AdaptedUNet({"unet": unet})
    yield model
    model.release()
