"""Optimizers in packages of their own: each trains, goes on bit for bit, or is one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lcp_plugin.cli import main
from lcp_plugin.config.load import load_config
from lcp_plugin.config.optimizer_table import KNOWN, KnownOptimizer
from lcp_plugin.errors import ConfigError
from lcp_plugin.training import optimizers as optim
from lcp_plugin.training.optimizers import OptimizerChoice, create_optimizer

ROOT = Path(__file__).parents[2]
Train = Callable[..., Any]
FREE = {"learning_rate": 1e-2}
FINDS_ITS_RATE = {"learning_rate": 1.0}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {  # kohya's name -> package, what it wants
    "AdamWScheduleFree": ("schedulefree", FREE),
    "RAdamScheduleFree": ("schedulefree", FREE),
    "SGDScheduleFree": ("schedulefree", FREE),
    "Prodigy": ("prodigyopt", {**FINDS_ITS_RATE, "optimizer_args": ["d0=1e-3"]}),
    "DAdaptation": ("dadaptation", FINDS_ITS_RATE),
    "DAdaptAdamPreprint": ("dadaptation", FINDS_ITS_RATE),
    "DAdaptAdaGrad": ("dadaptation", FINDS_ITS_RATE),
    "DAdaptAdam": ("dadaptation", FINDS_ITS_RATE),
    "DAdaptAdan": ("dadaptation", FINDS_ITS_RATE),
    "DAdaptAdanIP": ("dadaptation", FINDS_ITS_RATE),
    "DAdaptLion": ("dadaptation", FINDS_ITS_RATE),
    "DAdaptSGD": ("dadaptation", FINDS_ITS_RATE),
}
PACKAGES = sorted({package for package, _ in OPTIMIZERS.values()})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_really_trained_and_recorded(train: Train, name: str) -> None:
    package, given = OPTIMIZERS[name]
    pytest.importorskip(package)
    steps = 6 if name.startswith("RAdam") else 1  # it stands still until variance is known
    run = train(name, tasks=(0,), optimizer_type=name, max_train_steps=steps, **given)
    (folder,) = run.store.folders()
    assert any(bool(f.up.any()) for f in folder.read_adapter().values())
    assert folder.lineage["training"]["optimizer"].startswith(f"{package}.")


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "Prodigy", "DAdaptAdam"])
def test_a_resumed_run_takes_the_very_same_steps(train: Train, tmp_path: Path, name: str) -> None:
    package, given = OPTIMIZERS[name]
    pytest.importorskip(package)
    options = {"tasks": (0,), "optimizer_type": name, "max_train_steps": 4, **given}
    whole = train("whole", save_every_n_steps=2, save_state=True, **options)
    state = str(tmp_path / "out" / "whole-step00000002-state")
    again = train("again", resume=state, **options)
    a, b = (run.store.folders()[0].read_adapter() for run in (whole, again))
    assert any(bool(f.up.any()) for f in a.values())
    assert all(torch.equal(a[n].up, b[n].up) and torch.equal(a[n].down, b[n].down) for n in a)


def test_a_schedule_free_optimizer_delivers_its_average(train: Train) -> None:
    """x (the average) and z differ from the second step on; what is delivered is x."""
    schedulefree = pytest.importorskip("schedulefree")
    seen: list[bool] = []

    class Watched(schedulefree.AdamWScheduleFree):  # type: ignore[misc, name-defined]
        def eval(self) -> None:
            seen.append(bool(self.param_groups[0]["train_mode"]))
            super().eval()

    before = optim._load_class
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            optim,
            "_load_class",
            lambda path, name: Watched if path.startswith("schedulefree.") else before(path, name),
        )
        train("run", tasks=(0,), optimizer_type="AdamWScheduleFree", **FREE)
    assert seen[-1] is True, "it was still in training mode and then was told to show its average"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_missing_package_is_one_line_before_a_model_is_loaded(
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    package = OPTIMIZERS[name][0]
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == package else find(n, *a)
    )
    config = write_config("run", tasks=(0,), optimizer_type=name, learning_rate=1.0)
    assert main(["--config", str(config)]) == 2
    text = capsys.readouterr().err
    assert f"pip install {package}" in text
    assert name in text
    assert text.count("error: ") == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_itself_says_so_too(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    package = OPTIMIZERS[name][0]

    def missing(module: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{module}'")

    monkeypatch.setattr(optim.importlib, "import_module", missing)
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match=f"pip install {package}") as caught:
        create_optimizer(OptimizerChoice(name, rate=1.0), [{"params": [parameter], "lr": 1.0}])
    assert "\n" not in str(caught.value)


def test_different_rates_are_refused_where_one_rate_is_found_for_all(
    write_config: Callable[..., Path],
) -> None:
    pytest.importorskip("prodigyopt")
    given = {"tasks": (0,), "optimizer_type": "Prodigy", "network_train_unet_only": False}
    path = write_config("run", unet_lr=1.0, text_encoder_lr=0.5, **given)
    with pytest.raises(ConfigError, match=r"takes one rate for all parts, got 0\.5 and 1\.0"):
        load_config(["--config", str(path)])


def test_lora_plus_is_refused_where_one_rate_is_found_for_all(train: Train) -> None:
    pytest.importorskip("prodigyopt")
    given = {"tasks": (0,), "optimizer_type": "Prodigy", **FINDS_ITS_RATE}
    with pytest.raises(ConfigError, match=r"takes one rate for all, got 1\.0 and 4\.0"):
        train("run", network_args=["loraplus_lr_ratio=4"], **given)


@pytest.mark.parametrize(
    ("ratios", "got"),
    [
        (("loraplus_lr_ratio=4",), "1.0 and 4.0"),
        (("loraplus_unet_lr_ratio=16",), "1.0 and 16.0"),
        (("loraplus_text_encoder_lr_ratio=4",), ""),  # no text encoder is trained
        (("loraplus_lr_ratio=1",), ""),
        (("mid_lr_weight=1,.5,1", "loraplus_lr_ratio=4"), "0.5 and 1.0 and 2.0 and 4.0"),
        (("mid_lr_weight=1,.5,1",), "0.5 and 1.0"),
        (("mid_lr_weight=.5,1,.5",), ""),  # no layer of those two blocks is adapted
        (("mid_lr_weight=.5,1,.5", "conv_dim=2"), "0.5 and 1.0"),
        (("up_lr_weight=1,1,0,0,1,1,1,1,1",), ""),  # a block that is left out has no rate
        (("down_lr_weight=cosine",), " and "),
    ],
)
def test_rates_of_blocks_and_of_b_are_one_line_beside_one_rate_before_a_model_is_loaded(
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ratios: tuple[str, ...],
    got: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: n == "prodigyopt" or find(n, *a))
    given = {"tasks": (0,), "optimizer_type": "Prodigy", **FINDS_ITS_RATE}
    config = write_config("run", pretrained_model_name_or_path="no-such-base", **given)
    status = main(["--config", str(config), "--network_args", *ratios])
    text = capsys.readouterr().err
    if got:
        assert status == 2
        assert "'Prodigy' takes one rate for all, got" in text
        assert got in text
        assert (
            f"leave out {' and '.join(r.partition('=')[0] for r in ratios[:2] if '_lr' in r)}"
            in text
        )
        assert text.count("error: ") == 1
    else:
        assert status == 1
        assert "no-such-base" in text  # the next thing that is looked at


@pytest.mark.parametrize(("rate", "told"), [(1e-4, True), (1.0, False)])
def test_a_small_rate_of_an_optimizer_that_finds_its_own_is_pointed_out(
    write_config: Callable[..., Path], rate: float, told: bool
) -> None:
    pytest.importorskip("prodigyopt")
    path = write_config("run", optimizer_type="prodigy", learning_rate=rate)
    notices = load_config(["--config", str(path)]).notices
    assert any("finds its rate itself" in n for n in notices) is told


def test_the_packages_are_an_extra_of_the_installation() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if '"optimizers": [' in line]
    assert all(f'"{package}>=' in line for package in PACKAGES)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_every_optimizer_of_bitsandbytes_and_of_packages_passes_the_configs_check(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, known: KnownOptimizer
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: find(n, *a) or (n == known.package or None)
    )
    path = write_config("run", learning_rate=1.0, optimizer_type=known.name)
    assert load_config(["--config", str(path)]).options.optimizer_type == known.name


def test_no_two_optimizers_share_a_name_and_all_packages_are_the_tests_own() -> None:
    assert len({known.name.lower() for known in KNOWN}) == len(KNOWN)
    assert {known.name for known in KNOWN if known.package} == set(OPTIMIZERS)
