"""Precisions by their words: one table for options, tools and the base."""

from __future__ import annotations

import torch

from lcp_plugin.config.options import option_fields
from lcp_plugin.formats.precisions import HALVES, PRECISIONS, SAVED_AS


def test_every_precision_that_an_option_offers_is_in_the_table() -> None:
    choices = {name: set(field.metadata["choices"]) for name, field in option_fields().items()}
    assert choices["save_precision"] == set(SAVED_AS)
    assert choices["mixed_precision"] == {"no", *HALVES}
    assert choices["base_dtype"] == {"auto", *HALVES}


def test_kohyas_float_is_fp32() -> None:
    assert SAVED_AS["float"] is SAVED_AS["fp32"] is PRECISIONS["fp32"] is torch.float32
