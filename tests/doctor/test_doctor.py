"""The doctor: one line for everything, estimates that agree with the plan's, advice that fits."""

from __future__ import annotations

from pathlib import Path

import doctor as command
import pytest
import torch

from lcp_plugin.config.estimates import TEXT_PARAMETERS, UNET_PARAMETERS
from lcp_plugin.doctor import machine as doctor
from lcp_plugin.run.forecast import estimate_run


@pytest.mark.parametrize("preset", doctor.PRESETS)
@pytest.mark.parametrize("rank", [8, 64])
def test_the_components_add_up_to_what_the_plan_estimates(
    preset: str, rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LCP_CACHE", str(tmp_path))  # without this machine's own measurements
    options = doctor.preset_options(preset, rank)
    memory = doctor.preset_memory(preset, options)
    whole = estimate_run(options, 0, doctor.TASKS, doctor.SIDE**2).vram_gb
    assert memory.total == pytest.approx(whole)
    assert min(memory.parts.values()) > 0
    # docs/gpu.md: peaks of 10,752 and 5,808 MiB less 5.60 GB of base, factors and states; fp8
    measured = {"8gb": 0.866, "12gb": 0.49, "24gb": 5.67}[preset]
    assert memory.parts["activations"] == pytest.approx(measured, rel=0.03)


def test_the_unet_counts_as_much_as_its_precision_says() -> None:
    parts = [doctor.preset_memory(p, doctor.preset_options(p, 32)).parts for p in ("8gb", "12gb")]
    assert parts[0]["UNet"] == pytest.approx(UNET_PARAMETERS / 1e9)  # float8
    assert parts[1]["UNet"] == pytest.approx(2 * UNET_PARAMETERS / 1e9)  # bf16
    assert "text encoders" not in parts[0]  # cached, then out of memory


def test_live_text_encoders_are_counted() -> None:
    from dataclasses import replace

    options = replace(doctor.preset_options("12gb", 32), cache_text_encoder_outputs=False)
    parts = doctor.preset_memory("x", options).parts
    assert parts["text encoders"] == pytest.approx(2 * TEXT_PARAMETERS / 1e9)


def test_every_preset_fits_the_gpu_that_it_is_named_after() -> None:
    for preset in doctor.PRESETS:
        memory = doctor.preset_memory(preset, doctor.preset_options(preset, 32))
        assert memory.total < float(preset.removesuffix("gb"))


def test_the_most_generous_preset_that_fits_is_chosen() -> None:
    memories = [doctor.Memory(p, {"all": size}) for p, size in (("8gb", 6.0), ("12gb", 9.0))]
    chosen = [doctor.choose_preset(memories, free) for free in (None, 5.0, 7.0, 20.0)]
    assert [m and m.preset for m in chosen] == [None, None, "8gb", "12gb"]


def test_a_package_that_does_not_run_is_one_line() -> None:
    def broken() -> str:
        raise OSError("undefined symbol: x\nand a long trace")

    check = doctor._try("xformers", "faster attention", broken)
    assert not check.usable
    assert check.found == "unusable here (undefined symbol: x): faster attention"


def test_a_disk_that_is_too_small_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    assert doctor._examine_disk("output folder", folder, 0.0, "ten tasks").usable
    assert not doctor._examine_disk("output folder", folder, 1e9, "ten tasks").usable
    assert not folder.exists()


def test_the_command_prints_machine_and_presets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--output_dir", str(tmp_path)]
    assert command.main(where) == 0
    printed = capsys.readouterr().out
    capability = torch.backends.cpu.get_cpu_capability()
    for word in (
        "torch",
        "CUDA",
        capability,
        "bf16",
        "xformers",
        "bitsandbytes",
        "output folder",
        "8gb",
        "together",
    ):
        assert word in printed
    assert command.main([*where, "--network_dim", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: --network_dim 0: at least 1. See docs/")
