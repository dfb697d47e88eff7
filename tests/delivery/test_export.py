"""Exports do what the model after the boundary does; each is checked before it takes its place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import (
    CONV,
    OUT,
    TEXT_2,
    Q,
    build_uneven_toy,
    factors,
    fused,
    image,
    load_tool,
    mixed_adapter,
    random_adapter,
    same_factors,
)

from lcp_plugin.adapter import Adapter
from lcp_plugin.delivery.export import (
    Form,
    Learned,
    export,
    export_all,
    export_checkpoint,
    export_diff,
    export_lora,
    export_peft,
    read_learned,
    weigh_tasks,
)
from lcp_plugin.delivery.fusing import Part, fuse_file
from lcp_plugin.delivery.single_file import write_single_file
from lcp_plugin.delta import Delta, Dense
from lcp_plugin.errors import BaseModelError, ConfigError, DiskError, FileFormatError, LineageError
from lcp_plugin.formats.disk import read_json
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.lineage import Lineage
from lcp_plugin.formats.lora_file import check_lora, portable_adapter, read_lora, write_lora
from lcp_plugin.formats.tensors import read_header, read_tensors, write_tensors
from lcp_plugin.registry import create_strategy
from lcp_plugin.sdxl.load import hush_libraries
from lcp_plugin.store.carries import deliverable_adapter
from lcp_plugin.store.run_folder import RunStore
from lcp_plugin.tasks import Task, TaskRecord

# diffusers' scheduler under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A toy pipeline, its diffusers folder, and the same as a single file."""
    hush_libraries()
    folder = tmp_path_factory.mktemp("base")
    pipeline: Any = build_uneven_toy()
    pipeline.save_pretrained(str(folder / "toy"))
    write_single_file(folder / "toy", folder / "toy.safetensors")
    return pipeline, folder / "toy", folder / "toy.safetensors"


@pytest.fixture(scope="module")
def learned(base: tuple[Any, Path, Path]) -> Learned:
    """Something learned in UNet (convolutions too) and both text encoders."""
    adapter = random_adapter(
        base[0],
        lambda n: ".attn" in n or ".self_attn" in n or ".mlp" in n or "conv1" in n,
        lambda i: (3, 2.0),
    )
    return Learned(adapter, {"ss_output_name": "x"})


# ----------------------------------------------------------------------------------- checkpoints


def test_a_single_file_of_a_folder_is_read_by_diffusers_as_the_same_model(
    base: tuple[Any, Path, Path],
) -> None:
    from lcp_plugin.sdxl.load import load_pipeline

    pipeline, folder, file = base
    loaded = load_pipeline(str(file), config=str(folder))
    assert (image(loaded) - image(pipeline)).abs().max() < 1e-4


def test_a_fused_checkpoint_gives_the_images_of_the_fused_model(
    tmp_path: Path, base: tuple[Any, Path, Path], learned: Learned
) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline, folder, file = base
    done = export_checkpoint(learned, file, tmp_path / "fused.safetensors")
    loaded = StableDiffusionXLPipeline.from_single_file(str(done.path), config=str(folder))
    wanted = image(fused(pipeline, learned.delta))
    assert (wanted - image(pipeline)).abs().max() > 0.05
    assert (image(loaded) - wanted).abs().max() < 1e-4
    assert done.modules == len(learned.adapter)
    assert done.rounding_share < 1e-6


def test_a_fused_folder_gives_the_images_of_the_fused_model(
    tmp_path: Path, base: tuple[Any, Path, Path], learned: Learned
) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline, folder, _ = base
    done = export_checkpoint(learned, folder, tmp_path / "fused")
    loaded = StableDiffusionXLPipeline.from_pretrained(str(done.path))
    assert (image(loaded) - image(fused(pipeline, learned.delta))).abs().max() < 1e-4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fused"]


def test_a_checkpoint_holds_the_base_weights_that_the_run_was_trained_on(
    tmp_path: Path, toy_base: Path, train: Callable[..., Any]
) -> None:
    style = Adapter({Q: factors((32, 32), 2, 2.0, 5, size=0.1)})
    write_lora(tmp_path / "style.safetensors", style)
    given = {"base_weights": [str(tmp_path / "style.safetensors")], "base_weights_multiplier": 0.5}
    run = train("run", tasks=(0,), **given)
    learned = read_learned(run.store.root, create_strategy)
    export_checkpoint(learned, toy_base, tmp_path / "fused")
    weights = "unet/diffusion_pytorch_model.safetensors"
    before, after = (read_tensors(p / weights) for p in (toy_base, tmp_path / "fused"))
    name = Q.removeprefix("unet.") + ".weight"
    own = learned.delta[Q].dense() if Q in learned.delta else torch.zeros(32, 32)
    wanted = before[name].float() + 0.5 * style[Q].update() + own
    assert torch.allclose(after[name].float(), wanted, atol=2e-3)  # the base is in fp16
    assert not torch.allclose(after[name].float(), before[name].float() + own, atol=2e-3)
    (tmp_path / "style.safetensors").unlink()
    with pytest.raises(LineageError, match="base_weights .* are gone"):
        export_checkpoint(learned, toy_base, tmp_path / "again")


def test_names_order_types_metadata_and_all_other_tensors_of_a_checkpoint_stay(
    tmp_path: Path, base: tuple[Any, Path, Path]
) -> None:
    _, _, file = base
    tensors = {
        k: (v.half() if "diffusion" in k else v.bfloat16()) for k, v in read_tensors(file).items()
    }
    write_tensors(tmp_path / "half.safetensors", tensors, {"modelspec.title": "mine", "x": "y"})
    adapter = Adapter({Q: factors((32, 32), 2, 2.0, 0, size=0.1)})
    done = export_checkpoint(
        Learned(adapter, {}), tmp_path / "half.safetensors", tmp_path / "out.safetensors"
    )
    before = read_header(tmp_path / "half.safetensors")
    after = read_header(tmp_path / "out.safetensors")
    assert before == after
    assert list(before.tensors) == list(after.tensors)
    new = read_tensors(tmp_path / "out.safetensors")
    changed = [k for k in tensors if not torch.equal(tensors[k], new[k])]
    assert len(changed) == 1
    wanted = (tensors[changed[0]].float() + adapter[Q].update()).half()
    assert torch.equal(new[changed[0]], wanted)
    assert 0 < done.rounding_share < 0.05


def test_the_rounding_share_is_what_is_lost(tmp_path: Path) -> None:
    # W = 1 in bf16 (spacing 2^-7 above 1): D = 2^-8 rounds to even, back to 1: all is lost
    write_tensors(tmp_path / "w", {"w": torch.ones(4, 4, dtype=torch.bfloat16)})
    delta = Delta({Q: Dense(torch.full((4, 4), 2.0**-8))})
    found = fuse_file(tmp_path / "w", tmp_path / "o", {"w": [Part(Q)]}, delta)
    assert found.rounding_share == pytest.approx(1.0)
    delta = Delta({Q: Dense(torch.full((4, 4), 2.0**-6))})
    found = fuse_file(tmp_path / "w", tmp_path / "o", {"w": [Part(Q)]}, delta)
    assert found.rounding_share == 0.0


def test_a_third_of_a_stacked_tensor_is_changed_and_no_more(tmp_path: Path) -> None:
    whole = torch.randn(9, 4)
    write_tensors(tmp_path / "w", {"in_proj": whole, "last": torch.tensor([7.0])})
    delta = Delta({TEXT_2: Dense(torch.ones(3, 4))})
    fuse_file(tmp_path / "w", tmp_path / "o", {"in_proj": [Part(TEXT_2, 1)]}, delta)
    new = read_tensors(tmp_path / "o")
    assert torch.equal(new["in_proj"][3:6], whole[3:6] + 1)
    assert torch.equal(new["in_proj"][[0, 1, 2, 6, 7, 8]], whole[[0, 1, 2, 6, 7, 8]])
    assert new["last"].item() == 7.0


def test_a_base_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, base: tuple[Any, Path, Path]
) -> None:
    _, folder, file = base
    other = Learned(Adapter({Q: factors((8, 6), 2, 2.0, 0)}), {})
    lacking = Learned(Adapter({Q.replace("blocks.1", "blocks.7"): factors((8, 6), 2, 2.0, 0)}), {})
    for target, where in ((tmp_path / "a.safetensors", file), (tmp_path / "a", folder)):
        with pytest.raises(BaseModelError, match="another base"):
            export_checkpoint(other, where, target)
        with pytest.raises(BaseModelError, match="lacks"):
            export_checkpoint(lacking, where, target)
    assert list(tmp_path.iterdir()) == []


def test_text_encoders_of_one_width_make_no_single_file(tmp_path: Path) -> None:
    from lcp_plugin.tiny.architecture import build_toy

    build_toy().save_pretrained(str(tmp_path / "toy"))
    with pytest.raises(BaseModelError, match="16 wide"):
        write_single_file(tmp_path / "toy", tmp_path / "toy.safetensors")
    assert not (tmp_path / "toy.safetensors").exists()


def test_an_existing_folder_is_not_overwritten(
    tmp_path: Path, base: tuple[Any, Path, Path], learned: Learned
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"x")
    with pytest.raises(DiskError, match="not empty"):
        export_checkpoint(learned, base[1], tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["photo.png"]


def test_a_full_disk_leaves_no_half_checkpoint(
    tmp_path: Path,
    base: tuple[Any, Path, Path],
    learned: Learned,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "c.safetensors").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match="No space left"):
        export_checkpoint(learned, base[2], tmp_path / "c.safetensors")
    with pytest.raises(DiskError, match="No space left"):
        export_checkpoint(learned, base[1], tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]
    assert (tmp_path / "c.safetensors").read_bytes() == b"old"


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


def run_of(folder: Path, strategy_name: str) -> tuple[Path, list[Adapter]]:
    """Three tasks learned under a strategy, with the deliverable beside the run."""
    from lcp_plugin.store.carries import lineage_of

    store = RunStore(folder, "run")
    strategy = create_strategy(strategy_name, [])
    carry, updates = store.read_parent().carry, []
    for index, name in enumerate(("boot", "can", "teapot"), 1):
        task = Task(index, name, "object", f"sks {name}", ())
        trained = Adapter(
            {Q: factors((40, 30), 2, 1.0, index), OUT: factors((40, 40), 2, 1.0, -index)}
        )
        carry = strategy.end_task(task, carry, trained)
        facts = {
            "strategy": {"name": strategy_name, "args": []},
            "base": {"name": "toy", "hash": "ab"},
            "parent": {"hash": None, "source": None},
            "seed": 1,
            "data": {"images": 4},
            "training": {"steps": 10},
            "options": {"network_dim": 2},
            "versions": {"lcp_plugin": "0"},
            "session": {"id": "1", "started_at": "a", "finished_at": "b"},
        }
        store.save_task(task, trained, carry, strategy, facts)
        updates.append(trained)
    header = lineage_of(carry, strategy_name, [], "toy", "ab").to_metadata()
    write_lora(store.deliverable, portable_adapter(deliverable_adapter(carry)), header)
    return store.root, updates


@pytest.mark.parametrize("strategy", ["merge_init", "merge_ortho_init"])
@pytest.mark.parametrize("as_file", [True, False])
def test_one_task_of_an_additive_chain_is_left_out_and_one_weakened(
    tmp_path: Path, strategy: str, as_file: bool
) -> None:
    run, (boot, _, teapot) = run_of(tmp_path, strategy)
    source = run.with_suffix(".safetensors") if as_file else run
    learned = weigh_tasks(read_learned(source, create_strategy), {"teapot": 0.5, "can": 0.0})
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
        learned = read_learned(source, create_strategy)
        with pytest.raises(LineageError, match=f"strategy {strategy} does not sum"):
            weigh_tasks(learned, {"can": 0.0})


def test_an_unknown_task_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path, "merge_init")
    with pytest.raises(ConfigError, match="known are boot, can, teapot"):
        weigh_tasks(read_learned(run, create_strategy), {"cat": 1.0})


def test_a_run_exports_with_a_complete_header(tmp_path: Path) -> None:
    run, updates = run_of(tmp_path, "merge_init")
    for source in (run, run / "03_teapot"):
        learned = read_learned(source, create_strategy)
        header = learned.metadata
        assert header["modelspec.trigger_phrase"] == "sks boot, sks can, sks teapot"
        assert header["ss_steps"] == "30"
        assert header["ss_num_train_images"] == "12"
        assert header["ss_sd_model_name"] == "toy"
        lineage = Lineage.from_metadata(header)
        assert lineage is not None
        assert [t.name for t in lineage.tasks] == ["boot", "can", "teapot"]
        assert lineage.seeds["seed"] == 1
    first = read_learned(run / "01_boot", create_strategy)
    torch.testing.assert_close(first.delta[Q].dense(), updates[0][Q].update())


# ---------------------------------------------------------------------------------------- tools


def test_the_export_tool_truncates_and_weighs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = run_of(tmp_path, "merge_init")
    tool = load_tool("export")
    out = tmp_path / "out.safetensors"
    assert tool.main([str(run), "-o", str(out), "--as", "lora:3", "--weights", "can=0"]) == 0
    assert "truncation lost" in capsys.readouterr().out
    assert {f.rank for f in read_lora(out).adapter.values()} == {3}
    assert tool.main([str(run), "-o", str(out), "--weights", "can"]) == 2
    assert tool.main([str(run), "-o", str(out), "--as", "checkpoint"]) == 2
    assert tool.main([str(tmp_path / "none"), "-o", str(out)]) == 1
    assert "ConfigError" in capsys.readouterr().err


def test_the_export_tool_makes_a_single_file_of_a_folder(
    tmp_path: Path, base: tuple[Any, Path, Path], learned: Learned
) -> None:
    tool = load_tool("export")
    export_lora(learned, tmp_path / "a.safetensors")
    out = tmp_path / "fused.safetensors"
    arguments = [str(tmp_path / "a.safetensors"), "-o", str(out), "--as", "checkpoint"]
    assert tool.main([*arguments, "--base", str(base[1])]) == 0
    export_checkpoint(read_learned(arguments[0], create_strategy), base[2], tmp_path / "direct")
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
    export_checkpoint(read_learned(arguments[0], create_strategy), base[2], tmp_path / "direct")
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
