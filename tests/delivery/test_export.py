"""Exports do what the model after the boundary does; each is checked before it takes its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import CONV, OUT, Q, factors, mixed_adapter, run_of, same_factors

from lcp_plugin.adapter import Adapter
from lcp_plugin.delivery.export import export, export_all, export_diff, export_lora, export_peft
from lcp_plugin.delivery.forms import Form
from lcp_plugin.delivery.learned import Learned, read_learned, weigh_tasks
from lcp_plugin.errors import ConfigError, FileFormatError, LineageError
from lcp_plugin.formats.checked_lora import check_lora
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.lineage import Lineage
from lcp_plugin.formats.lora_file import read_lora, write_lora
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.tasks import TaskRecord

# ------------------------------------------------------------------------------------- LoRA files


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_lora_export_is_the_same_update(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    learned = Learned(mixed_adapter(), {})
    done = export_lora(learned, tmp_path / "a.safetensors", layout, dtype=dtype)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    back = read_lora(done.path).total
    for name, factors_ in mixed_adapter().items():
        wanted = factors_.update()
        assert (back[name].dense() - wanted).norm() <= tolerance * wanted.norm()


def test_a_truncated_lora_is_its_own_truncated_delta_and_says_its_error(tmp_path: Path) -> None:
    adapter = Adapter({n: factors((30, 20), 6, 6.0, i) for i, n in enumerate((Q, OUT))})
    learned = Learned(adapter, Lineage(tasks=(TaskRecord(1, "a", "object", "a"),)).to_metadata())
    done = export_lora(learned, tmp_path / "a.safetensors", rank=2)
    back = read_lora(done.path)
    assert {f.rank for f in back.adapter.values()} == {2}
    lost = total = 0.0
    for name, f in adapter.items():
        u, s, vh = torch.linalg.svd(f.update().double(), full_matrices=False)
        best = u[:, :2] * s[:2] @ vh[:2]
        torch.testing.assert_close(back.adapter[name].update().double(), best, rtol=1e-4, atol=1e-4)
        assert done.errors[name] == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-4)
        lost, total = lost + float(s[2:].square().sum()), total + float(s.square().sum())
    assert done.error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    said = json.loads(back.metadata["ss_lcp_truncation"])
    assert said["rank"] == 2
    assert said["error"] == pytest.approx(done.error, abs=1e-5)
    assert back.metadata["ss_network_dim"] == "2"
    assert back.metadata["sshs_model_hash"] == file_model_hash(done.path)


def test_a_diff_export_is_the_dense_update_under_kohyas_names(tmp_path: Path) -> None:
    learned = Learned(mixed_adapter(), {"ss_x": "1"})
    done = export_diff(learned, tmp_path / "a.safetensors")
    header = read_header(done.path)
    assert header.metadata["ss_x"] == "1"
    assert all(name.endswith(".diff") for name in header.tensors)
    assert header.tensors["lora_unet_output_blocks_2_2_conv.diff"].shape == (4, 4, 3, 3)
    back = read_lora(done.path).delta
    for name, entry in learned.delta.items():
        assert torch.equal(back[name].dense(), entry.dense())
        assert back[name].kernel == entry.kernel
    small = export_diff(learned, tmp_path / "b.safetensors", torch.bfloat16)
    assert small.bytes < done.bytes


def test_a_peft_export_is_a_folder_for_each_model(tmp_path: Path) -> None:
    done = export_peft(Learned(mixed_adapter(), {}), tmp_path / "p")
    models = sorted(p for p in done.path.iterdir() if p.is_dir())
    assert [p.name for p in models] == ["text_encoder", "text_encoder_2", "unet"]
    back = Adapter({k: v for p in models for k, v in read_lora(p).adapter.items()})
    assert same_factors(back, mixed_adapter())
    again = export_peft(Learned(mixed_adapter().without([Q]), {}), tmp_path / "p")  # ours: replaced
    assert Q not in read_lora(again.path / "unet").adapter
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_a_run_exports_every_form_beside_its_deliverable(
    tmp_path: Path, base: tuple[Any, Path, Path]
) -> None:
    learned = Learned(Adapter({Q: factors((32, 32), 3, 3.0, 0, size=0.1)}), {})
    forms = ["lora", "lora:2", "diff", "diffusers", "peft", "checkpoint"]
    done = export_all(learned, forms, tmp_path / "run.safetensors", base[2])
    names = ["run_r2.safetensors", "run_diff.safetensors", "run_diffusers.safetensors", "run_peft"]
    assert [d.path.name for d in done] == [*names, "run_checkpoint.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(d.path.name for d in done)
    (folder,) = export_all(learned, ["checkpoint"], tmp_path / "run.safetensors", base[1])
    assert folder.path == tmp_path / "run_checkpoint"


def test_an_export_that_does_not_read_back_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcp_plugin.delivery import export as module

    path = tmp_path / "a.safetensors"
    export_lora(Learned(mixed_adapter(), {}), path)
    before = path.read_bytes()

    def write_other(target: Path, adapter: Adapter, *rest: Any) -> None:
        write_lora(target, adapter.map_down(lambda _, a: a * 1.01), *rest)

    monkeypatch.setattr(module, "write_lora", write_other)
    with pytest.raises(FileFormatError, match="does not read back"):
        export_lora(Learned(mixed_adapter(), {}), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_reading_back_notices_a_missing_module(tmp_path: Path) -> None:
    write_lora(tmp_path / "a", mixed_adapter().without([CONV]))
    with pytest.raises(FileFormatError, match="other modules"):
        check_lora(tmp_path / "a", mixed_adapter(), torch.float32)


@pytest.mark.parametrize("text", ["lora:0", "lora:x", "diff:4", "gguf", "lora:-1"])
def test_unknown_forms_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="lora:RANK"):
        Form.parse(text)


def test_a_checkpoint_wants_a_base(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--base"):
        export(Learned(mixed_adapter(), {}), Form("checkpoint"), tmp_path / "a")


# ------------------------------------------------------------------------------- tasks of a chain


@pytest.mark.parametrize("strategy", ["merge_init", "merge_ortho_init"])
@pytest.mark.parametrize("as_file", [True, False])
def test_one_task_of_an_additive_chain_is_left_out_and_one_weakened(
    tmp_path: Path, strategy: str, as_file: bool
) -> None:
    run, (boot, _, teapot) = run_of(tmp_path, strategy)
    source = run.with_suffix(".safetensors") if as_file else run
    learned = weigh_tasks(read_learned(source), {"teapot": 0.5, "can": 0.0})
    for name in (Q, OUT):
        wanted = boot[name].update().double() + 0.5 * teapot[name].update().double()
        got = learned.delta[name].dense().double()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert learned.adapter[name].rank <= 6
    assert json.loads(learned.metadata["ss_lcp_weights"]) == {"teapot": 0.5, "can": 0.0}


@pytest.mark.parametrize("strategy", ["magmax", "naive"])
def test_a_chain_that_is_no_sum_cannot_be_weighted(tmp_path: Path, strategy: str) -> None:
    run, _ = run_of(tmp_path, strategy)
    for source in (run, run.with_suffix(".safetensors")):
        learned = read_learned(source)
        with pytest.raises(LineageError, match=f"strategy {strategy} does not sum"):
            weigh_tasks(learned, {"can": 0.0})


def test_an_unknown_task_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path, "merge_init")
    with pytest.raises(ConfigError, match="known are boot, can, teapot"):
        weigh_tasks(read_learned(run), {"cat": 1.0})


def test_a_run_exports_with_a_complete_header(tmp_path: Path) -> None:
    run, updates = run_of(tmp_path, "merge_init")
    for source in (run, run / "03_teapot"):
        learned = read_learned(source)
        header = learned.metadata
        assert header["modelspec.trigger_phrase"] == "sks boot, sks can, sks teapot"
        assert header["ss_steps"] == "30"
        assert header["ss_num_train_images"] == "12"
        assert header["ss_sd_model_name"] == "toy"
        lineage = Lineage.from_metadata(header)
        assert lineage is not None
        assert [t.name for t in lineage.tasks] == ["boot", "can", "teapot"]
        assert lineage.seeds["seed"] == 1
    first = read_learned(run / "01_boot")
    torch.testing.assert_close(first.delta[Q].dense(), updates[0][Q].update())
