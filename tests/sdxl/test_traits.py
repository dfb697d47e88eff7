"""What a base says of itself is believed before its weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import build_uneven_toy
from safetensors.torch import load_file, save_file

from lcp_plugin.cli import main
from lcp_plugin.config.load import load_config
from lcp_plugin.delivery.single_file import write_single_file
from lcp_plugin.errors import BaseModelError, ConfigError
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.observers.jsonl import read_steps
from lcp_plugin.run.settling import settle_zero_terminal
from lcp_plugin.sdxl.load import hush_libraries, load_pipeline
from lcp_plugin.sdxl.traits import Traits, is_at_hand, read_traits

# diffusers' scheduler under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
Train = Callable[..., Any]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Keys -> a toy base as one file that holds them, its configs beside it."""
    hush_libraries()
    folder = tmp_path_factory.mktemp("single")
    pipeline: Any = build_uneven_toy()
    pipeline.save_pretrained(str(folder / "_config"))
    write_single_file(folder / "_config", folder / "plain.safetensors")
    tensors = load_file(folder / "plain.safetensors")
    found = {"": folder / "plain.safetensors"}
    for keys in ("v_pred", "ztsnr", "v_pred ztsnr"):
        found[keys] = folder / f"{keys.replace(' ', '_')}.safetensors"
        save_file({**tensors, **{k: torch.zeros(0) for k in keys.split()}}, found[keys])
    for path in found.values():
        shutil.copytree(folder / "_config", path.with_name(f"{path.stem}_config"))
    return found


@pytest.mark.parametrize(
    ("keys", "traits"),
    [
        ("", Traits()),
        ("v_pred", Traits("v_prediction")),
        ("ztsnr", Traits("v_prediction", zero_terminal_snr=True)),
        ("v_pred ztsnr", Traits("v_prediction", zero_terminal_snr=True)),
    ],
)
def test_a_single_file_says_by_keys_how_it_was_trained(
    checkpoints: dict[str, Path], keys: str, traits: Traits
) -> None:
    assert read_traits(str(checkpoints[keys])) == traits
    pipeline = load_pipeline(str(checkpoints[keys]))
    assert pipeline.scheduler.config.prediction_type == traits.prediction_type
    assert bool(pipeline.scheduler.config.rescale_betas_zero_snr) is traits.zero_terminal_snr


def test_a_folder_says_it_in_its_configs(toy_base: Path, tmp_path: Path) -> None:
    assert read_traits(str(toy_base)) == Traits(native_side=32)
    assert read_traits("tiny-sdxl").native_side == 48
    other = with_scheduler(toy_base, tmp_path / "v", rescale_betas_zero_snr=True)
    assert read_traits(str(other)).zero_terminal_snr
    (other / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(BaseModelError, match="damaged"):
        read_traits(str(other))


def with_scheduler(base: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a base with other settings of its scheduler."""
    shutil.copytree(base, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return folder


def test_a_base_with_ztsnr_turns_both_options_on_with_a_notice(
    train: Train, checkpoints: dict[str, Path]
) -> None:
    def run(name: str, keys: str, **given: Any) -> Any:
        base = str(checkpoints[keys])
        return train(name, tasks=(0,), pretrained_model_name_or_path=base, **given)

    found = run("found", "ztsnr")
    assert any("zero_terminal_snr is on" in line for line in found.facts["said"])
    assert any("predicts v" in line for line in found.facts["said"])
    header = read_header(found.store.deliverable).metadata
    assert header["ss_zero_terminal_snr"] == "True"
    assert header["modelspec.prediction_type"] == "v"
    given = run("given", "", v_parameterization=True, zero_terminal_snr=True)
    only_v = run("only_v", "v_pred")
    losses = {r.name: losses_of(r) for r in (found, given, only_v)}
    assert losses["found"] == pytest.approx(losses["given"], rel=1e-3)
    assert losses["found"] != pytest.approx(losses["only_v"], rel=1e-2)


def losses_of(run: Any) -> list[float]:
    return [step["loss"] for step in read_steps(run.store.root / "logs" / "steps.jsonl")]


@pytest.mark.parametrize("source", ["key", "scheduler"])
def test_what_the_user_says_of_zero_terminal_snr_holds(
    train: Train, checkpoints: dict[str, Path], toy_base: Path, tmp_path: Path, source: str
) -> None:
    base = checkpoints["ztsnr"]
    if source == "scheduler":
        base = with_scheduler(toy_base, tmp_path / "rescaled", rescale_betas_zero_snr=True)
    common = {"tasks": (0,), "pretrained_model_name_or_path": str(base), "max_train_steps": 1}
    off = train("off", zero_terminal_snr=False, **common)
    assert any("zero_terminal_snr = false is given and holds" in s for s in off.facts["said"])
    assert float(off.base.schedule.alphas[-1]) > 1e-3
    on = train("on", **common)
    assert float(on.base.schedule.alphas[-1]) == pytest.approx(0, abs=1e-6)


def test_a_sampler_that_the_base_forbids_is_refused_before_it_is_loaded(
    write_config: Callable[..., Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n")
    path = write_config(
        "run",
        tasks=(0,),
        pretrained_model_name_or_path=str(checkpoints["ztsnr"]),
        sample_prompts=str(tmp_path / "prompts.txt"),
        sample_sampler="heun",
    )
    with pytest.raises(ConfigError, match="'heun' cannot start from pure noise.*euler"):
        settle_zero_terminal(load_config(["--config", str(path)]))


def test_the_plan_of_a_dry_run_is_at_the_bases_own_size(
    write_config: Callable[..., Path],
    checkpoints: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--config", str(write_config("run")), "--dry_run"]) == 0
    assert "32x32: 3" in capsys.readouterr().out
    base = ["--pretrained_model_name_or_path", str(checkpoints["ztsnr"])]
    assert main(["--config", str(write_config("run")), "--dry_run", *base]) == 0
    plan = capsys.readouterr().out
    assert "1024x1024: 3" in plan
    assert "zero_terminal_snr is on" in plan


def test_a_dry_run_of_a_base_that_is_not_there_is_one_line(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dry_run", "--pretrained_model_name_or_path", "nowhere.safetensors"]
    assert main(["--config", str(write_config("run")), *flags]) == 1
    text = capsys.readouterr().err
    assert "nowhere.safetensors' does not exist" in text
    assert text.count("error: ") == 1


def test_a_hub_id_is_not_fetched_for_a_plan(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_at_hand("org/model")
    assert is_at_hand("tiny-sdxl")
    flags = ["--dry_run", "--pretrained_model_name_or_path", "org/model"]
    assert main(["--config", str(write_config("run")), *flags]) == 0
    assert "1024x1024: 3" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["8gb", "12gb", "24gb", "paper"])
def test_a_presets_plan_on_the_embedded_base_shows_no_estimates_of_sdxl(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    config = write_config("run", pretrained_model_name_or_path="tiny-sdxl")
    assert main(["--config", str(config), "--dry_run", "--preset", preset]) == 0
    plan = capsys.readouterr().out
    assert "48x48: 3" in plan
    assert "Estimates are made for SDXL, not for tiny-sdxl" in plan
    assert "GPU memory" not in plan
    assert f"preset {preset}" in plan
    assert "has no effect" not in plan, "a preset of ours must not say what changes nothing"
