"""The options themselves: kohya's defaults, and a page that leaves none out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lcp_plugin.config.convert import Unfit, convert, convert_option, parse_bytes
from lcp_plugin.config.options import Options, option_fields, option_types
from lcp_plugin.config.options_page import render_options_page

REPOSITORY = Path(__file__).resolve().parents[2]
# name -> default, from kohya-ss/sd-scripts at 48d368fa (parsers of sdxl_train_network.py)
KOHYA = {
    "caption_extension": ".caption",
    "keep_tokens": 0,
    "caption_separator": ",",
    "min_bucket_reso": 256,
    "max_bucket_reso": 1024,
    "bucket_reso_steps": 64,
    "vae_batch_size": 1,
    "train_batch_size": 1,
    "dataset_repeats": 1,
    "token_warmup_min": 1,
    "token_warmup_step": 0,
    "network_dim": None,
    "network_alpha": 1,
    "optimizer_type": "",
    "learning_rate": 2e-6,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1,
    "max_grad_norm": 1.0,
    "max_train_steps": 1600,
    "max_train_epochs": None,
    "gradient_accumulation_steps": 1,
    "mixed_precision": "no",
    "max_data_loader_n_workers": 8,
    "noise_offset": None,
    "multires_noise_discount": 0.3,
    "min_snr_gamma": None,
    "loss_type": "l2",
    "huber_schedule": "snr",
    "huber_c": 0.1,
    "huber_scale": 1.0,
    "prior_loss_weight": 1.0,
    "sample_sampler": "ddim",
    "save_model_as": "safetensors",
    "save_precision": None,
    "validation_split": 0.0,
    "dynamo_backend": "inductor",
    "zero_stage": 2,
}


@pytest.mark.parametrize("name", KOHYA)
def test_defaults_are_kohyas(name: str) -> None:
    assert getattr(Options(), name) == KOHYA[name]


@pytest.mark.parametrize("name", list(option_fields()))
def test_every_option_is_documented(name: str) -> None:
    meta = option_fields()[name].metadata
    assert len(meta["help"]) > 3
    assert meta["group"]
    assert f"`{name}`" in render_options_page()
    if meta["grade"] in ("A", "X"):
        assert meta["no_effect"] or meta["differs"] or "old" in meta["help"], "says what it does"


def test_the_page_in_the_repository_is_up_to_date() -> None:
    tool = REPOSITORY / "tools" / "options_page.py"
    command = [sys.executable, str(tool), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", list(option_fields()))
def test_defaults_pass_their_own_checks(name: str) -> None:
    field, default = option_fields()[name], getattr(Options(), name)
    if default not in (None, (), ""):
        assert convert_option(field, option_types()[name], default) == default
        assert convert_option(field, option_types()[name], str(default)) == default


def test_options_without_effect_do_not_bind_a_resumed_run() -> None:
    for field in option_fields().values():
        assert not (field.metadata["no_effect"] and field.metadata["fixed"])


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("1e-4", float, 1e-4),
        ("5%", float, 0.05),
        (3, float, 3.0),
        ("12", int, 12),
        (12.0, int, 12),
        ("Yes", bool, True),
        (0, bool, False),
        (7, str, "7"),
        ("a", tuple[str, ...], ("a",)),
        ([1, "2"], tuple[float, ...], (1.0, 2.0)),
        ("640, 480", tuple[int, int], (640, 480)),
        (512, tuple[int, int] | None, (512, 512)),
    ],
)
def test_values_are_converted(value: object, kind: object, expected: object) -> None:
    assert convert(value, kind) == expected


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("x", float),
        (True, float),
        ("nan", float),
        (1.5, int),
        ("2", bool),
        ([1], str),
        ("1,2,3", tuple[int, int]),
        ("4", tuple[int, int]),
        (None, int),
    ],
)
def test_unfit_values_are_refused(value: object, kind: object) -> None:
    with pytest.raises(Unfit):
        convert(value, kind)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GB", 2 * 10**9),
        ("500 mb", 5 * 10**8),
        ("1.5GiB", 3 * 2**29),
        ("1000", 1000),
        ("2k", 2000),
    ],
)
def test_sizes_are_parsed(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "big", "-1GB", "0", "2XB"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(Unfit):
        parse_bytes(text)
