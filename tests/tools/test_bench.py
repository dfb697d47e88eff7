"""The benchmark measures what it says: same losses on both sides, real shapes, honest labels."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import boundaries, carries, checkpoint_parts, on_disk, rehearsal, steps
from benchmarks.command import run_command
from benchmarks.measure import (
    CPU,
    Child,
    Row,
    Timing,
    alternate,
    format_table,
    median,
    peak_mb,
    row_of,
    run_child,
)
from benchmarks.parts import PARTS
from safetensors.torch import load_file

from lcp_plugin.delta import Stacked, entry_of
from lcp_plugin.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_both_sides_of_the_step_take_the_same_steps() -> None:
    found = steps.compare_steps("tiny", 48, rank=4, rounds=2, warm=1)
    assert len(found.losses) == 3
    assert found.difference < steps.LOSS_TOLERANCE
    assert len({ours for ours, _ in found.losses}) == 3, "no step was taken"


def test_sdxl_has_560_matrices_with_955_187_200_weights() -> None:
    matrices = boundaries.matrices_of("sdxl")
    assert len(matrices.shapes) == len(set(matrices.names())) == 560
    assert sum(out * inputs for out, inputs in matrices.shapes) == 955_187_200


def test_a_truncation_is_measured_against_the_best_possible_error() -> None:
    small = boundaries.Matrices("tiny", ((40, 30),))
    entry = entry_of(next(iter(small.adapter(8, 0).values())))
    assert isinstance(entry, Stacked)
    assert boundaries._excess(entry, entry.dense(), 4) < 1e-5


def test_an_orthogonal_start_is_scaled_from_the_columns_measured() -> None:
    (row,) = boundaries.measure_orthogonal(boundaries.Matrices("tiny", ((8, 64),)), 1, columns=2)
    assert "2 columns, extrapolated x 32" in row.note
    assert row.baseline > row.ours


def test_pairs_alternate_and_change_who_goes_first() -> None:
    order: list[str] = []
    alternate(lambda: order.append("a"), lambda: order.append("b"), rounds=3, warm=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


def test_medians_are_taken_of_each_clock() -> None:
    assert median([Timing(1, 9), Timing(2, 7), Timing(9, 8)]) == Timing(2, 8)


def test_a_row_says_whether_its_bar_is_met() -> None:
    met = row_of("a", Timing(1, 1), Timing(2, 4), bar=0.5)
    assert (met.ratio, met.wall_ratio, met.verdict) == (0.5, 0.25, "met")
    missed = Row("b", 3.0, 4.0, CPU, bar=0.5)
    assert missed.verdict == "missed"
    assert {"name", "ours", "baseline", "ratio", "unit", "peak_mb"} <= missed.to_json().keys()
    lines = format_table([met, missed]).splitlines()
    assert ("<= 0.5" in lines[1], "missed" in lines[2]) == (True, True)


def test_boundaries_at_topo_size_have_sdxls_own_shapes() -> None:
    matrices = boundaries.matrices_of("topo")
    assert set(matrices.shapes) <= set(boundaries.matrices_of("sdxl").shapes)
    assert (len(matrices.shapes), matrices.rank, matrices.label) == (35, 64, "SDXL shapes (1/16)")
    assert matrices.bar(0.5) == 0.5
    assert boundaries.matrices_of("tiny").bar(0.5) is None


def test_every_strategys_carry_keeps_99_percent_on_a_half_precision_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = boundaries.Matrices("tiny", ((96, 80),) * 3)
    monkeypatch.setattr(carries, "matrices_of", lambda size: small)
    rows = carries.measure_rounding("tiny")
    assert len(rows) == 4
    assert all("stochastic rounding" in row.note for row in rows)
    # right in the mean: of 23,040 entries, each off by half a step of 2^-8 |W| at most
    assert all(row.ratio < 0.2 for row in rows), [row.ratio for row in rows]


def test_a_run_of_ten_tasks_holds_its_last_carry_and_ten_adapters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = boundaries.Matrices("tiny", ((640, 640),) * 3)
    monkeypatch.setattr(carries, "matrices_of", lambda size: small)
    (row,) = carries.measure_disk("tiny", tasks=3)
    assert 1.0 <= row.ratio < 1.1, row


def test_both_ways_to_fuse_a_checkpoint_give_the_same_weights(tmp_path: Path) -> None:
    on_disk.write_checkpoint_inputs(tmp_path, boundaries.Matrices("tiny", ((16, 8), (8, 16))))
    checkpoint_parts.fuse_streamed(str(tmp_path))
    checkpoint_parts.fuse_whole(str(tmp_path))
    ours, whole = (load_file(tmp_path / f"{way}.safetensors") for way in ("fused", "whole"))
    assert ours.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0.01, atol=1e-3)


def test_a_process_has_a_peak_of_its_own() -> None:
    held = torch.ones(50_000_000)  # 200 MB here are none of the child's
    words = "import torch; from benchmarks.measure import print_facts; print_facts()"
    child = run_child([sys.executable, "-c", words])
    assert float(held[0]) == 1
    assert peak_mb() > 200
    assert 50 < child.peak_mb < peak_mb()


def test_a_part_that_fails_is_an_error_with_its_words() -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        run_child([sys.executable, "-c", "raise SystemExit('no such thing')"])


@pytest.mark.parametrize("part", PARTS)
def test_every_part_exists(part: str) -> None:
    module, _, function = PARTS[part].partition(":")
    assert callable(getattr(importlib.import_module(f"benchmarks.{module}"), function))


def test_the_command_writes_its_rows(tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    table = run_command(["--size", "tiny", "--only", "merge", "save", "--json", str(target)])
    facts = json.loads(target.read_text())
    assert [row["name"] for row in facts["rows"]] == [
        "exact merge of two rank 16, tiny",
        "save an adapter, tiny",
        "save an adapter, tiny, beside raw bytes",
        "load an adapter, tiny",
    ]
    assert all({"bar", "met"} <= row.keys() for row in facts["rows"])
    assert torch.backends.cpu.get_cpu_capability() in facts["machine"]["instructions"]
    assert all(row["ratio"] == row["ours"] / row["baseline"] for row in facts["rows"])
    assert "exact merge" in table


@pytest.mark.parametrize(("size", "name"), [("tiny", "nonsense"), ("sdxl", "step")])
def test_a_measurement_that_does_not_exist_is_refused(size: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"--only {name}: at --size {size} there are"):
        run_command(["--size", size, "--only", name])


@pytest.mark.parametrize("arguments", [["--help"], ["--learning_rte", "1"], ["--preset", "x"]])
def test_nothing_heavy_is_imported_before_the_configuration_is_checked(
    arguments: list[str],
) -> None:
    script = (
        "import sys\n"
        "from lcp_plugin.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    pass\n"
        "print('heavy:', sorted({'torch', 'numpy', 'diffusers', 'PIL'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert "heavy: []" in done.stdout, done.stdout[-300:] + done.stderr[-300:]


def test_recall_is_measured_beside_the_same_task_without(monkeypatch) -> None:
    """The runs' own steps.jsonl are read: rehearsal as told costs twice the step, half as often."""
    commands = []

    def run(command: list[str]) -> Child:
        commands.append(command)
        config = Path(command[command.index("--config") + 1])
        every = next((int(a[-1]) for a in command if a.startswith("every=")), 0)
        log = config.parent / config.stem / "logs" / "steps.jsonl"
        log.parent.mkdir(parents=True)
        facts = [
            {
                "event": "step",
                "time": 110.0 + 6 * bool(every),
                "seconds": 2.0 if every and step % every == 0 else 1.0,
                "peak_memory_mb": 202.0 if every else 200.0,
            }
            for step in range(4 + rehearsal.WARM)
        ]
        log.write_text("\n".join(map(json.dumps, facts)), encoding="utf-8")
        return Child(1.0, 1.0, {}, 0, began=100.0)

    monkeypatch.setattr(rehearsal, "run_child", run)
    whole, half, memory, drawing = rehearsal.measure_rehearsal("tiny", steps=4, rounds=1)
    assert (whole.ratio, half.ratio, memory.ratio) == (2.0, 1.5, 1.01)
    assert {whole.verdict, half.verdict, memory.verdict} == {"met"}
    assert (drawing.ours, drawing.baseline) == (6.0, 1.0)
    assert len(commands) == 4  # the first task once
    assert all("--allow_strategy_change" in c for c in commands[1:])
