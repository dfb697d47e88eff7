"""doctor --measure at toy size: rows as they come, failures as results, estimates corrected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import doctor
import pytest
import torch
from told import assert_one_error

from lcp_plugin.config import estimates
from lcp_plugin.config.options import Options
from lcp_plugin.doctor import measure_report, measuring
from lcp_plugin.hooks import AdapterSpec, Carry, TaskStart
from lcp_plugin.strategies.merge_init import MergeInit
from lcp_plugin.tasks import Task
from lcp_plugin.tiny.architecture import SDXL, TOY, draw_pipeline
from lcp_plugin.training.processes import create_accelerator

QUICK = ("--steps", "2", "--sample_steps", "1", "--network_dim", "2", "--mixed_precision", "no")
Doctor = Callable[..., tuple[int, str, str]]


class Hungry(MergeInit):
    """Has no memory for its second task."""

    name = "hungry"

    def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
        if task.index == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return super().begin_task(task, carry, spec)


class Fatal(MergeInit):
    """Takes its process along."""

    name = "fatal"

    def begin_task(self, task: Task, carry: Carry, spec: AdapterSpec) -> TaskStart:
        os._exit(9)


@pytest.fixture
def run_doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """run_doctor(*flags) -> status, stdout, stderr of the command."""

    def run(*flags: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = doctor.main(flags)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring processes are forked from this one, which spares each its imports."""
    draw_pipeline(TOY, torch.device("cpu"), torch.float32, seed=0)  # imports what draws and trains
    create_accelerator("no")

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", measuring.__name__]
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = measuring.main(command[3:])
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return subprocess.CompletedProcess(command, status, "", "")

    monkeypatch.setattr(measure_report, "subprocess", SimpleNamespace(run=run))


def read_rows(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows


def test_a_preset_is_measured_in_a_process_of_its_own(run_doctor: Doctor) -> None:
    status, table, told = run_doctor("--measure", "--presets", "24gb", *QUICK)
    assert status == 0, told
    assert "fits" in table
    assert "measuring 24gb" in told


@pytest.mark.usefixtures("_forked")
def test_each_preset_is_trained_and_sampled_at_both_ends_of_a_chain(
    run_doctor: Doctor, tmp_path: Path
) -> None:
    file = tmp_path / "m.json"
    presets = ("--presets", "24gb", "paper")
    status, table, told = run_doctor(
        "--measure", *presets, "--tasks", "3", "--json", str(file), *QUICK
    )
    assert status == 0, told
    rows = read_rows(file)
    found = [(row["preset"], row["task"], row["status"]) for row in rows]
    assert found == [(p, t, "fits") for p in ("24gb", "paper") for t in (1, 3)]
    for row in rows:
        assert row["size"] == "tiny"  # what there is without a GPU
        assert (row["rank"], row["limit_gb"]) == (2, None)
        assert min(row["seconds"], row["sample_seconds"], row["peak_gb"]) > 0
        assert f"{row['seconds']:.3f}" in table
    assert not (tmp_path / "output").exists()


@pytest.mark.usefixtures("_forked")
def test_no_memory_at_the_last_task_is_a_result_and_a_dead_process_a_failure(
    run_doctor: Doctor, tmp_path: Path
) -> None:
    file = tmp_path / "m.json"
    common = ("--measure", "--tasks", "2", "--json", str(file), *QUICK)
    hungry = ("--presets", "24gb", "12gb", "--strategy", f"{__name__}:Hungry")
    status, table, told = run_doctor(*common, *hungry)
    assert status == 0, told
    found = [(row["preset"], row["task"], row["status"]) for row in read_rows(file)]
    ends = ((1, "fits"), (2, "does not fit"))
    assert found == [(preset, *end) for preset in ("24gb", "12gb") for end in ends]
    assert "Tried to allocate 2 GiB" in table
    status, table, _ = run_doctor(*common, "--presets", "24gb", "--strategy", f"{__name__}:Fatal")
    assert status == 1
    assert "the process ended with 9" in table
    assert [row["status"] for row in read_rows(file)] == ["failed"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--measure", "--limit", "8GB"), "--limit is the memory of a GPU"),
        (("--measure", "--limit", "lots"), "--limit lots: wanted a size"),
        (("--measure", "--tasks", "0"), "--tasks 0: at least 1"),
        (("--measure", "--learning_rte", "1"), "learning_rte"),
        (("--learning_rate", "1"), "with --measure only"),
    ],
)
def test_bad_input_is_one_line(run_doctor: Doctor, flags: tuple[str, ...], told: str) -> None:
    if "8GB" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status, out, err = run_doctor(*flags)
    assert (status, out) == (2, "")
    assert told in err
    assert_one_error(err)


def test_the_measured_base_has_sdxls_parameters() -> None:
    from lcp_plugin.tiny import architecture

    with torch.device("meta"):
        unet = architecture.build_unet(SDXL)
        texts = [architecture._build_text_encoder(SDXL, projected=p) for p in (False, True)]
        vae = architecture._build_vae(SDXL)
    counts = [sum(p.numel() for p in m.parameters()) for m in (unet, *texts, vae)]
    assert counts[0] == estimates.UNET_PARAMETERS
    assert counts[1] + counts[2] == estimates.TEXT_PARAMETERS
    assert counts[3] == estimates.VAE_PARAMETERS


def test_a_drawn_pipeline_is_seeded_and_whole() -> None:
    one, two = (draw_pipeline(TOY, torch.device("cpu"), torch.bfloat16, seed=3) for _ in range(2))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        first, second = getattr(one, part), getattr(two, part)
        for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b), name
            assert torch.isfinite(a).all()
        assert next(first.parameters()).dtype is (
            torch.float32 if part == "vae" else torch.bfloat16
        )
    embeds = one.encode_prompt(prompt="a cup", device="cpu", do_classifier_free_guidance=False)[0]
    assert torch.isfinite(embeds.float()).all()


COST = {
    "card": "Some Card",
    "checkpointing": True,
    "half": True,
    "seconds": 0.5,
    "activations_gb": 3.0,
    "growth": 0.02,
    "preset": "12gb",
    "source": "measured, torch 9",
}


def test_what_was_measured_here_corrects_the_estimates_and_names_the_card(
    run_doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LCP_CACHE", str(tmp_path))
    options = Options(mixed_precision="bf16", gradient_checkpointing=True, network_dim=32)
    assumed = estimates.estimate_seconds(options, 1024**2, 1)
    (tmp_path / "measured.json").write_text(json.dumps({"costs": [COST]}))
    assert estimates.estimate_seconds(options, 1024**2, 1) == 0.5 != assumed
    assert estimates.estimate_seconds(options, 1024**2, 11) == pytest.approx(0.5 * 1.1)
    assert estimates.estimate_memory(options, 1, 1024**2)["activations"] == 3.0
    _, out, _ = run_doctor()
    assert "Some Card (measured, torch 9)" in out
    assert "an NVIDIA H200 (measured" in out  # without checkpointing: somebody else's


def test_a_damaged_file_of_measurements_is_set_aside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LCP_CACHE", str(tmp_path))
    (tmp_path / "measured.json").write_text('{"costs": [{"card": "x"}]}')
    assert estimates.find_cost(Options()).source == "estimate"


def test_memory_counts_all_tasks_the_last_one_included() -> None:
    def carried(tasks: int, **given: Any) -> float:
        half = {"mixed_precision": "bf16", "network_dim": 64, "strategy": "merge_init"}
        options = Options(**{**half, **given})
        return estimates.count_memory(options, tasks)["carried delta"]

    factors = estimates.count_factors(estimates.ATTENTION_SHAPES, 64)
    assert carried(10) == carried(10, strategy="magmax") == 0  # fused: the chain does not grow
    beside = {"fp8_base_unet": True}
    assert carried(1, **beside) == 0
    assert carried(2, **beside) == pytest.approx(2 * factors / 1e9)
    assert carried(2, carry_as="branch") == carried(2, **beside)
    assert carried(5, **beside) == pytest.approx(4 * carried(2, **beside))
    assert carried(10, strategy="naive", **beside) == carried(10, strategy="recall", **beside) == 0
    given = {"strategy": "recall", "strategy_args": ("of=merge_init",)}
    assert carried(5, **given, **beside) == carried(5, **beside)
    dense = 955_187_200  # weights of the 560 attention projections
    assert carried(100, **beside) == pytest.approx(2 * dense / 1e9)
    assert carried(2, strategy="magmax", **beside) == pytest.approx(2 * dense / 1e9)
