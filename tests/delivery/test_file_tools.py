"""tools/export_lora.py, merge_lora.py and task_conflicts.py, called as from a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import Q, factors, load_tool, mixed_adapter, run_of

from lcp_plugin.adapter import Adapter, Factors
from lcp_plugin.delivery.checkpoint import export_checkpoint
from lcp_plugin.delivery.export import export_lora
from lcp_plugin.delivery.learned import Learned, read_learned
from lcp_plugin.formats.disk import read_json
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.lineage import Lineage
from lcp_plugin.formats.lora_file import read_lora, write_lora


def test_the_export_tool_truncates_and_weighs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, updates = run_of(tmp_path, "merge_init")
    tool = load_tool("export")
    out = tmp_path / "out.safetensors"
    assert tool.main([str(run), "-o", str(out), "--as", "lora:3", "--weights", "can=0"]) == 0
    assert "truncation lost" in capsys.readouterr().out
    back = read_lora(out).adapter
    assert {f.rank for f in back.values()} == {3}
    for name, f in back.items():  # the best of rank 3 for boot and teapot, without the can
        kept = updates[0][name].update().double() + updates[2][name].update().double()
        u, s, vh = torch.linalg.svd(kept, full_matrices=False)
        best = u[:, :3] * s[:3] @ vh[:3]
        torch.testing.assert_close(f.update().double(), best, rtol=1e-4, atol=1e-4)
    assert tool.main([str(run), "-o", str(out), "--weights", "can"]) == 2
    assert tool.main([str(run), "-o", str(out), "--as", "checkpoint"]) == 2
    assert tool.main([str(tmp_path / "none"), "-o", str(out)]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("form", ["lora", "diffusers", "peft", "diff"])
def test_values_that_half_precision_does_not_hold_are_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    large = {Q: Factors(torch.full((2, 32), 300.0), torch.full((32, 2), 1e5), 2.0)}
    write_lora(tmp_path / "a.safetensors", Adapter(large))
    out = tmp_path / ("x" if form == "peft" else "x.safetensors")
    given = [str(tmp_path / "a.safetensors"), "-o", str(out), "--as", form]
    assert load_tool("export").main([*given, "--precision", "fp16"]) == 1
    told = capsys.readouterr().err
    assert "beyond what fp16 holds" in told
    assert ".tmp" not in told
    assert not out.exists()
    assert load_tool("export").main([*given, "--precision", "bf16"]) == 0


@pytest.mark.parametrize("method", ["sum", "magmax", "ties", "dare", "orthogonal"])
def test_weights_beyond_floats_say_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    for file in files:
        write_lora(file, mixed_adapter())
    out = ["-o", str(tmp_path / "m.safetensors"), "--quiet", "--method", method]
    tool = load_tool("merge_adapters")
    assert tool.main([*files, *out, "--weights", "-1e39", "1"]) == 2
    assert "give smaller ones" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()
    assert tool.main([*files, *out, "--weights", "1", "-1e-1"]) == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--scale nan", "wanted a finite number"),
        ("--scale 0", "nothing is left of the merge"),
        ("--weights 0 0", "nothing is left of the merge"),
    ],
)
def test_a_merge_of_nothing_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, words: str
) -> None:
    write_lora(tmp_path / "a.safetensors", mixed_adapter())
    files = [str(tmp_path / "a.safetensors")] * 2
    out = ["-o", str(tmp_path / "m.safetensors"), "--quiet"]
    assert load_tool("merge_adapters").main([*files, *out, *given.split()]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--weights can=nan", "wanted TASK=NUMBER, got 'nan'"),
        ("--weights can=1 can=2", "can has a weight already"),
        ("--weights =2", "wanted TASK=NUMBER"),
        ("--weights can=1e39", "give smaller ones"),
        ("--weights boot=0 can=0 teapot=0", "nothing is left"),
        ("--base tiny-sdxl", "--as lora has none"),
    ],
)
def test_exports_that_make_no_sense_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, words: str
) -> None:
    run, _ = run_of(tmp_path, "merge_init")
    out = ["-o", str(tmp_path / "x.safetensors"), *given.split()]
    assert load_tool("export").main([str(run), *out]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["export", "merge_adapters"])
def test_a_folder_as_output_is_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tool: str
) -> None:
    write_lora(tmp_path / "a.safetensors", mixed_adapter())
    given = [str(tmp_path / "a.safetensors"), "-o", str(tmp_path)]
    assert load_tool(tool).main(given) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["lora", "diffusers", "peft", "diff"])
def test_an_export_makes_the_folders_that_its_output_names(tmp_path: Path, form: str) -> None:
    write_lora(tmp_path / "a.safetensors", mixed_adapter())
    out = tmp_path / "new ä" / "deep" / ("x" if form == "peft" else "x.safetensors")
    given = [str(tmp_path / "a.safetensors"), "-o", str(out), "--as", form]
    assert load_tool("export").main(given) == 0
    assert [p.name for p in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("output", "words"), [("", "'.' is a folder, not the name of a file"), ("a/b.x", "a")]
)
@pytest.mark.parametrize("tool", ["export", "merge_adapters"])
def test_an_output_that_can_be_no_file_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tool: str,
    output: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(b"a file where a folder is wanted")
    write_lora("b.safetensors", mixed_adapter())
    assert load_tool(tool).main(["b.safetensors", "-o", output]) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.startswith("error: ")
    assert words in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b.safetensors"]


def test_the_export_tool_makes_a_single_file_of_a_folder(
    tmp_path: Path, base: tuple[Any, Path, Path], learned: Learned
) -> None:
    tool = load_tool("export")
    export_lora(learned, tmp_path / "a.safetensors")
    out = tmp_path / "fused.safetensors"
    arguments = [str(tmp_path / "a.safetensors"), "-o", str(out), "--as", "checkpoint"]
    assert tool.main([*arguments, "--base", str(base[1])]) == 0
    export_checkpoint(read_learned(arguments[0]), base[2], tmp_path / "direct")
    assert file_model_hash(out) == file_model_hash(tmp_path / "direct")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "direct", out.name]


def test_the_merge_tool_sums_exactly_and_names_its_parents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load_tool("merge_adapters")
    a, b = mixed_adapter(), Adapter({Q: factors((8, 6), 1, 5.0, 9)})
    hashes = [
        write_lora(tmp_path / f"{n}.safetensors", x)["sshs_model_hash"]
        for n, x in (("a", a), ("b", b))
    ]
    files_ = [str(tmp_path / f"{n}.safetensors") for n in "ab"]
    out = str(tmp_path / "out.safetensors")
    assert tool.main([*files_, "-o", out, "--weights", "0.7", "-0.4"]) == 0
    assert "signs opposed" in capsys.readouterr().out
    merged = read_lora(out)
    wanted = 0.7 * a[Q].update().double() - 0.4 * b[Q].update().double()
    torch.testing.assert_close(merged.total[Q].dense().double(), wanted, rtol=1e-5, atol=1e-5)
    lineage = Lineage.from_metadata(merged.metadata)
    assert lineage is not None
    assert [(p.hash, p.weight) for p in lineage.parents] == list(
        zip(hashes, (0.7, -0.4), strict=True)
    )
    assert merged.metadata["modelspec.merged_from"] == "a, b"
    assert tool.main([*files_, "-o", out, "--method", "ties", "--rank", "2", "--quiet"]) == 0
    assert tool.main([*files_, "-o", out, "--weights", "1"]) == 2
    assert tool.main([*files_, "-o", out, "--weights", "0", "0"]) == 2


def test_the_merge_tool_fuses_into_a_base(
    tmp_path: Path, base: tuple[Any, Path, Path], learned: Learned
) -> None:
    tool = load_tool("merge_adapters")
    export_lora(learned, tmp_path / "a.safetensors")
    arguments = [str(tmp_path / "a.safetensors"), "-o", str(tmp_path / "m.safetensors")]
    assert tool.main([*arguments, "--base", str(base[2])]) == 0
    export_checkpoint(read_learned(arguments[0]), base[2], tmp_path / "direct")
    assert file_model_hash(tmp_path / "m.safetensors") == file_model_hash(tmp_path / "direct")


def test_the_conflicts_tool_prints_saves_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load_tool("conflicts")
    run, _ = run_of(tmp_path, "merge_init")
    assert tool.main([str(run), "--plot", str(tmp_path / "p.png"), "--blocks"]) == 0
    assert "unet.down_blocks.1" in capsys.readouterr().out
    facts = read_json(run / "conflicts.json")
    assert [row["task"] for row in facts["after"]] == ["can", "teapot"]
    assert set(facts["after"][0]["ratios"]) == {"since", "after"}
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    for name, adapter in (("a", mixed_adapter()), ("b", mixed_adapter())):
        write_lora(tmp_path / f"{name}.safetensors", adapter)
    two = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert tool.main([*two, "--rank", "1", "--json", str(tmp_path / "c.json")]) == 0
    facts = read_json(tmp_path / "c.json")
    assert facts["pairs"][0]["opposed"] == 0.0  # the same file twice
    assert facts["pairs"][0]["row_overlap"] == pytest.approx(1.0)
    assert 0 < facts["energy_lost"][""] < 1
    assert tool.main(two[:1]) == 2


def test_a_folder_that_is_not_one_lora_says_which_file_may_be_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load_tool("merge_adapters")
    run, _ = run_of(tmp_path, "merge_init")
    write_lora(tmp_path / "a.safetensors", mixed_adapter())
    write_lora(beside := run.with_name(f"{run.name}.safetensors"), mixed_adapter())
    out = tmp_path / "m.safetensors"
    for folder, told in (
        (run, f"{beside} stands beside it: name that."),
        (sorted(run.glob("*/lineage.json"))[-1].parent, "adapter.safetensors and carry"),
        (tmp_path / run.name / "logs", "holds no LoRA file (adapter_model.safetensors, "),
    ):
        folder.mkdir(exist_ok=True)
        assert tool.main([str(tmp_path / "a.safetensors"), str(folder), "-o", str(out)]) == 1
        assert told in capsys.readouterr().err
        assert not out.exists()
