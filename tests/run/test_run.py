"""Whole runs on a toy base: chaining, resuming, refusing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lcp_plugin.cli import main
from lcp_plugin.errors import DiskError, LineageError
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.tensors import read_header, read_tensors, write_tensors
from lcp_plugin.sdxl.live import run_unet
from lcp_plugin.store.run_folder import RunStore

FOUR = ("naive", "merge_init", "merge_ortho_init", "magmax", "recall")
Train = Callable[..., Any]


def read_all(store: RunStore) -> dict[str, torch.Tensor]:
    """Every tensor that a run left in its last task folder and its deliverable."""
    folder = store.folders()[-1].path
    found = {}
    for path in (folder / "adapter.safetensors", folder / "carry.safetensors", store.deliverable):
        for key, tensor in read_tensors(path).items():
            found[f"{path.name if path != store.deliverable else 'deliverable'}:{key}"] = tensor
    return found


def assert_equal_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, different[:3]


@pytest.mark.parametrize("strategy", FOUR)
def test_chained_runs_equal_one_run_bit_for_bit(train: Train, strategy: str) -> None:
    whole = train("whole", tasks=(0, 1, 2), strategy=strategy)
    first = train("first", tasks=(0,), strategy=strategy)
    second = train(
        "second", tasks=(1,), strategy=strategy, prev=str(first.store.folders()[-1].path)
    )
    third = train("third", tasks=(2,), strategy=strategy, prev=str(second.store.root))
    assert third.store.folders()[-1].index == 3
    assert_equal_tensors(read_all(whole.store), read_all(third.store))


# ------------------------------------------------------------------------- killed and restarted


LAW_2: dict[str, Any] = {  # everything that could make a resumed run differ
    "optimizer_type": "AdamW8bit",
    "network_dim": 4,
    "network_dropout": 0.2,
    "gradient_accumulation_steps": 2,
    "max_data_loader_n_workers": 2,
    "cache_latents": False,
    "random_crop": True,
    "max_train_steps": 5,
    "resume_every_n_steps": 2,
    "samples_per_task": 1,
    "sample_steps": 2,
}


def run_and_kill(config: Path, kill_at: int | None) -> tuple[int, int]:
    """Runs a config in a forked process that kills itself (SIGKILL) at its n-th event.

    An event is an optimizer step, the moment before a rename (every third time with the temporary
    file cut in half first, as a power cut leaves it), or the moment after it.

    Returns:
        the process's status (-9 if killed) and, if it was not, its number of events.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = _run_with_events(config, kill_at, writing)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    counted = os.read(reading, 16)
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, int(counted or 0)


def _run_with_events(config: Path, kill_at: int | None, writing: int) -> int:
    from lcp_plugin.observers import JsonLines

    events = 0
    replace, on_step_end = os.replace, JsonLines.on_step_end

    def happen(half: Path | None = None) -> None:
        nonlocal events
        events += 1
        if events == kill_at:
            if half is not None and events % 3 == 0:
                os.truncate(half, os.path.getsize(half) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def replace_with_events(source: Any, target: Any, **more: Any) -> None:
        happen(Path(source))
        replace(source, target, **more)
        happen()

    def step_with_events(self: Any, run: Any, step: Any) -> None:
        on_step_end(self, run, step)
        happen()

    os.replace, JsonLines.on_step_end = replace_with_events, step_with_events  # type: ignore[assignment, method-assign]
    status = main(["--config", str(config)])
    os.write(writing, str(events).encode())
    return status


def read_lineages(store: RunStore) -> list[dict[str, Any]]:
    """lineage.json of every task without what may differ: times and session ids."""
    return [{k: v for k, v in f.lineage.items() if k != "session"} for f in store.folders()]


@pytest.mark.parametrize("strategy", FOUR)
def test_a_run_killed_five_times_ends_as_if_it_had_not_been(
    write_config: Callable[..., Path], tmp_path: Path, strategy: str
) -> None:
    options = {**LAW_2, "strategy": strategy}
    out = tmp_path / "out"
    status, events = run_and_kill(write_config("run", **options), None)
    assert status == 0
    whole, tensors = read_lineages(RunStore(out, "run")), read_all(RunStore(out, "run"))
    shutil.move(out, tmp_path / "whole")
    config = write_config("run", **options)
    points = random.Random(strategy)
    for _ in range(5):
        status, _ = run_and_kill(config, points.randint(1, max(2, events // 3)))
        assert status == -signal.SIGKILL
    status, _ = run_and_kill(config, None)
    assert status == 0
    assert_equal_tensors(tensors, read_all(RunStore(out, "run")))
    assert read_lineages(RunStore(out, "run")) == whole


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.97])
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(
    write_config: Callable[..., Path], tmp_path: Path, share: float
) -> None:
    out = tmp_path / "out"
    config = write_config("run", **LAW_2)
    _, events = run_and_kill(config, None)
    tensors = read_all(RunStore(out, "run"))
    shutil.rmtree(out)
    assert run_and_kill(config, max(1, int(share * events)))[0] == -signal.SIGKILL
    assert run_and_kill(config, None)[0] == 0
    assert_equal_tensors(tensors, read_all(RunStore(out, "run")))


def test_sigterm_saves_first_and_the_same_command_goes_on(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcp_plugin.observers import JsonLines

    options = {"max_train_steps": 4, "resume_every_n_steps": 0}
    assert main(["--config", str(write_config("whole", **options))]) == 0
    config, stopped = write_config("run", **options), []
    log = JsonLines.on_step_end

    def stop_once(self: Any, run: Any, step: Any) -> None:
        log(self, run, step)
        if not stopped and step.index == 3:
            stopped.append(step.index)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(JsonLines, "on_step_end", stop_once)
    assert main(["--config", str(config)]) == 130
    store = RunStore(tmp_path / "out", "run")
    assert store.folders() == []
    assert [p.name for p in (store.root / "state").iterdir()] == ["01_disc0_step00000003"]
    assert main(["--config", str(config)]) == 0
    assert stopped == [3]
    assert_equal_tensors(read_all(RunStore(tmp_path / "out", "whole")), read_all(store))


# ---------------------------------------------------------------------------- refused, in one line


def run_for_errors(
    capsys: pytest.CaptureFixture[str], config: Path, *flags: str
) -> tuple[int, str]:
    """Exit status and the error lines of a run."""
    capsys.readouterr()
    status = main(["--config", str(config), *flags])
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return status, "\n".join(lines)


def test_a_finished_run_refuses_to_start_over_and_says_the_way_out(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = write_config("run", tasks=(0,))
    assert main(["--config", str(config)]) == 0
    before = (tmp_path / "out" / "run.safetensors").read_bytes()
    status, text = run_for_errors(capsys, config)
    assert status == 1
    assert "finished" in text
    assert "--overwrite" in text
    assert "--output_name" in text
    assert (tmp_path / "out" / "run.safetensors").read_bytes() == before
    assert main(["--config", str(config), "--overwrite"]) == 0


def test_tasks_appended_to_a_finished_run_continue_it(train: Train) -> None:
    whole = train("whole", tasks=(0, 1, 2))
    train("run", tasks=(0, 1))
    longer = train("run", tasks=(0, 1, 2))
    assert_equal_tensors(read_all(whole.store), read_all(longer.store))


def test_a_changed_config_refuses_to_resume_and_names_the_keys(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config("run", **LAW_2)
    assert run_and_kill(config, 30)[0] == -signal.SIGKILL  # behind a saved state
    status, text = run_for_errors(capsys, config, "--learning_rate", "0.5")
    assert status == 1
    assert "learning_rate" in text
    assert "0.5" in text
    assert "max_train_steps" not in text


def test_a_chain_with_another_strategy_must_be_asked_for(
    train: Train, write_config: Callable[..., Path]
) -> None:
    first = train("first", tasks=(0,), strategy="naive")
    prev = str(first.store.root)
    with pytest.raises(LineageError, match="--allow_strategy_change"):
        train("second", tasks=(1,), strategy="magmax", prev=prev)
    run = train("second", tasks=(1,), strategy="magmax", prev=prev, allow_strategy_change=True)
    assert run.store.folders()[-1].index == 2


def test_a_parent_of_another_base_is_refused_before_a_model_is_loaded(
    train: Train, toy_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcp_plugin.run import runner

    first = train("first", tasks=(0,))
    other = tmp_path / "other_base"
    shutil.copytree(toy_base, other)
    weights = next((other / "unet").glob("*.safetensors"))
    tensors = read_tensors(weights)
    write_tensors(weights, {k: t + 1 for k, t in tensors.items()}, {"format": "pt"})
    monkeypatch.setattr(runner, "load_pipeline", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(LineageError, match="Chain runs on one base"):
        train(
            "second",
            tasks=(1,),
            prev=str(first.store.root),
            pretrained_model_name_or_path=str(other),
        )


def test_nan_stops_the_run_and_keeps_the_last_good_state(
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lcp_plugin.training import trainer

    config, honest, steps = write_config("run", max_train_steps=6), trainer.compute_loss, []

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(1)
        loss = honest(*args, **kwargs)
        return loss * float("nan") if len(steps) == 4 else loss

    monkeypatch.setattr(trainer, "compute_loss", poisoned)
    status, text = run_for_errors(capsys, config)
    assert status == 1
    assert "step 4" in text
    assert "learning_rate" in text
    store = RunStore(tmp_path / "out", "run")
    assert [p.name for p in (store.root / "state").iterdir()] == ["01_disc0_step00000002"]
    assert main(["--config", str(config)]) == 0


def test_too_little_disk_is_refused_before_training(
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = write_config("run")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    status, text = run_for_errors(capsys, config)
    assert status == 1
    assert "GB free" in text
    assert not (tmp_path / "out" / "run" / "01_disc0").exists()


# ------------------------------------------------------------------------ every task is delivered


@pytest.mark.parametrize("strategy", FOUR)
def test_the_deliverable_in_diffusers_does_what_the_model_after_the_boundary_does(
    train: Train, toy_base: Path, strategy: str
) -> None:
    from diffusers import StableDiffusionXLPipeline

    run = train("run", tasks=(0, 1), strategy=strategy, max_train_steps=8, network_alpha=1)
    trainer = run.trainer
    run.show(run.store.folders()[-1].read_carry())
    batch = {
        "encoder_hidden_states": torch.randn(
            1, 77, trainer.pipeline.unet.config.cross_attention_dim
        ),
        "text_embeds": torch.randn(1, trainer.pipeline.text_encoder_2.config.projection_dim),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    }
    latents, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        ours = run_unet(trainer.adapted, latents, timesteps, batch, torch.float32)
    fresh = StableDiffusionXLPipeline.from_pretrained(toy_base)
    with torch.no_grad():
        before = run_unet(fresh.unet, latents, timesteps, batch, torch.float32)
    fresh.load_lora_weights(str(run.store.deliverable))
    with torch.no_grad():
        theirs = run_unet(fresh.unet, latents, timesteps, batch, torch.float32)
    assert float((ours - before).abs().max()) > 1e-2  # something was learned
    assert float((ours - theirs).abs().max()) < 1e-4


@pytest.mark.parametrize("strategy", FOUR)
def test_a_chain_on_the_deliverable_equals_a_chain_on_the_folder(
    train: Train, strategy: str
) -> None:
    first = train("first", tasks=(0, 1), strategy=strategy)
    by_folder = train("folder", tasks=(2,), strategy=strategy, prev=str(first.store.root))
    by_file = train("file", tasks=(2,), strategy=strategy, prev=str(first.store.deliverable))
    a, b = read_all(by_folder.store), read_all(by_file.store)
    for key in a:
        if key.startswith(("adapter", "deliverable")):
            assert torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("layout", ["kohya", "kohya_blocks", "diffusers", "peft"])
@pytest.mark.parametrize("strategy", ["naive", "merge_ortho_init"])
def test_a_run_chains_on_anyones_lora(
    train: Train, tmp_path: Path, layout: str, strategy: str
) -> None:
    from lcp_plugin.formats.lora_file import write_lora

    parent = train("parent", tasks=(0,), network_dim=3, network_alpha=1, strategy="naive")
    adapter = parent.store.folders()[-1].read_adapter()
    path = tmp_path / "theirs.safetensors"
    write_lora(path, adapter, {}, torch.float32, layout)
    run = train("run", tasks=(1,), strategy=strategy, prev=str(path))
    folder = run.store.folders()[-1]
    assert [r.name for r in folder.records] == ["theirs", "disc1"]
    assert folder.index == 2
    learned = folder.read_adapter()
    name = next(iter(learned))
    expected = (3, 1.0) if strategy == "naive" else (2, 2.0)  # alpha and rank travel with factors
    assert (learned[name].rank, learned[name].alpha) == expected


def test_earlier_carries_are_rebuilt_bit_for_bit(train: Train) -> None:
    from lcp_plugin.registry import create_strategy
    from lcp_plugin.store.carries import carry_to_tensors

    for strategy in FOUR:
        kept = train(f"all_{strategy}", tasks=(0, 1, 2), strategy=strategy, keep_carries="all")
        last = train(f"last_{strategy}", tasks=(0, 1, 2), strategy=strategy)
        assert not last.store.folders()[0].carry_file.exists()
        for folder in kept.store.folders():
            rebuilt = last.store.carry_after(folder.index, create_strategy)
            assert_equal_tensors(carry_to_tensors(folder.read_carry()), carry_to_tensors(rebuilt))


def test_the_first_task_is_the_same_under_all_four(train: Train) -> None:
    adapters = [
        train(f"run_{s}", tasks=(0,), strategy=s).store.folders()[0].path / "adapter.safetensors"
        for s in FOUR
    ]
    assert len({file_model_hash(path) for path in adapters}) == 1


def test_bounds_are_runs_too(train: Train) -> None:
    joint = train("joint", tasks=(0, 1), strategy="joint")
    (folder,) = joint.store.folders()
    assert [r.name for r in folder.records] == ["disc0", "disc1"]
    assert folder.lineage["training"]["steps"] == 6
    alone = train("alone", tasks=(0, 1), strategy="independent")
    end = train("end", tasks=(0, 1), strategy="merge_at_end")
    first, second = (f.read_adapter() for f in alone.store.folders())
    both = [f.read_adapter() for f in end.store.folders()]
    name = next(iter(first))
    assert torch.equal(both[1][name].up, second[name].up)  # trained without the first
    total = end.store.folders()[-1].read_carry().total[name].dense().double()
    expected = sum(f[name].up.double() @ f[name].down.double() for f in (first, second))
    assert torch.allclose(total, expected, atol=1e-6)


def test_samples_and_grid_are_written_for_every_stage(train: Train) -> None:
    run = train("run", tasks=(0, 1), samples_per_task=2, sample_steps=2)
    found = sorted(
        p.relative_to(run.store.root / "samples").as_posix()
        for p in (run.store.root / "samples").rglob("*.png")
    )
    stages = {"00_base": (0, 1), "01_disc0": (0,), "02_disc1": (0, 1)}
    wanted = [f"{s}/disc{t}_{i}.png" for s, tasks in stages.items() for t in tasks for i in (0, 1)]
    assert found == sorted([*wanted, "grid.png"])
    with Image.open(run.store.root / "samples" / "02_disc1" / "disc0_0.png") as image:
        assert image.info["prompt"] == "a photo of sks0 disc"


def test_order_seed_shuffles_as_the_paper_does(train: Train) -> None:
    run = train("run", tasks=(0, 1, 2, 3), order_seed=5, max_train_steps=1)
    names = [f"disc{i}" for i in range(4)]
    random.seed(5)
    random.shuffle(names)
    assert [f.name for f in run.store.folders()] == names


def test_resume_refuses_changed_images(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], pictures: Path
) -> None:
    config = write_config("run", **LAW_2)
    saved = config.parent / "out" / "run" / "state"
    while not list(saved.glob("*/state.json")):  # each try is killed a little further on
        assert run_and_kill(config, 12)[0] == -signal.SIGKILL
    Image.new("RGB", (64, 64), "lime").save(pictures / "disc0" / "00.png")
    status, text = run_for_errors(capsys, config)
    assert status == 1
    assert "changed" in text


def test_two_processes_may_not_train_one_run(
    train: Train, write_config: Callable[..., Path]
) -> None:
    from lcp_plugin.store.lock import locked

    config = write_config("run")
    root = RunStore(config.parent / "out", "run").root
    ready, done = os.pipe(), os.pipe()
    other = os.fork()
    if other == 0:
        with locked(root, "run"):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(DiskError, match="another process"):
        train("run")
    os.write(done[1], b"x")
    os.waitpid(other, 0)
    train("run")


def test_a_worker_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path: Path) -> None:
    from lcp_plugin.store.lock import locked

    ready, done = os.pipe(), os.pipe()
    run = os.fork()
    if run == 0:
        with locked(tmp_path, "run"):
            if os.fork() == 0:  # as a data loader's worker
                os.write(ready[1], b"x")
                os.read(done[0], 1)
                os._exit(0)
            os.read(done[0], 1)
    os.read(ready[0], 1)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    with locked(tmp_path, "run"):
        os.write(done[1], b"x")  # the worker is still there
    assert (tmp_path / ".lock").exists()


def test_text_encoders_train_chain_and_survive_a_unet_only_continuation(train: Train) -> None:
    first = train(
        "first",
        tasks=(0,),
        network_train_unet_only=False,
        cache_text_encoder_outputs=False,
        text_encoder_lr=[1e-2, 2e-2],
    )
    adapter = first.store.folders()[0].read_adapter()
    parts = {name.split(".")[0] for name in adapter}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}
    untrained = {n.rpartition(".layers.")[0] for n, f in adapter.items() if not f.up.any()}
    assert untrained <= {
        "text_encoder.text_model.encoder"
    }  # its last layer: SDXL reads the one before
    for strategy in ("naive", "merge_init"):
        second = train(
            f"second_{strategy}",
            tasks=(1,),
            prev=str(first.store.deliverable),
            strategy=strategy,
            allow_strategy_change=True,
        )
        total = second.store.folders()[-1].read_carry().total
        for name, factors in adapter.items():
            if not name.startswith("unet."):
                assert torch.allclose(total[name].dense(), factors.update(), atol=1e-7)
        delivered = read_header(second.store.deliverable).tensors
        assert any(key.startswith("lora_te1_") for key in delivered)
        assert any(key.startswith("lora_te2_") for key in delivered)


@pytest.mark.parametrize("before", FOUR)
def test_every_strategy_chains_on_every_other(train: Train, before: str) -> None:
    first = train("first", tasks=(0,), strategy=before)
    for after in FOUR:
        run = train(
            f"then_{after}",
            tasks=(1,),
            strategy=after,
            prev=str(first.store.root),
            allow_strategy_change=True,
        )
        (folder,) = run.store.folders()
        assert [r.name for r in folder.records] == ["disc0", "disc1"]


def test_xformers_missing_is_one_warning_and_sdpa(
    train: Train, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "xformers", None)
    train("run", tasks=(0, 1), xformers=True)
    assert [r.message for r in caplog.records if "xformers" in r.message] == [
        r.message for r in caplog.records if "SDPA instead" in r.message
    ]
    assert sum("SDPA instead" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "full_bf16": True},
        {"optimizer_type": "AdamW8bit"},
        {"optimizer_type": "PagedAdamW8bit"},
        {"optimizer_type": "Lion8bit"},
        {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]},
        {"optimizer_type": "torch.optim.RMSprop"},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
        {"v_parameterization": True},
        {"lora_targets": "transformer"},
        {"cache_latents": False, "cache_text_encoder_outputs": False},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_training_options_train(train: Train, options: dict[str, Any]) -> None:
    run = train("run", tasks=(0, 1), strategy="magmax", **options)
    for folder in run.store.folders():
        assert any(bool(f.up.abs().max() > 0) for f in folder.read_adapter().values())
    if "optimizer_type" in options:
        used = run.store.folders()[0].lineage["training"]["optimizer"]
        assert options["optimizer_type"].split(".")[-1] in used


def test_gradient_checkpointing_changes_nothing_but_memory(train: Train) -> None:
    plain = train("plain", tasks=(0,))
    saving = train("saving", tasks=(0,), gradient_checkpointing=True)
    a, b = (r.store.folders()[0].read_adapter() for r in (plain, saving))
    for name in a:
        assert torch.allclose(a[name].up, b[name].up, atol=1e-6)


def test_a_state_that_replaying_cannot_give_is_kept(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcp_plugin.registry import create_strategy

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    run = train("run", tasks=(0, 1), strategy="proof_strategies:OnlineEwc")
    first = run.store.folders()[0]
    assert not first.carry_file.exists()
    state = run.store.parent_at(1, create_strategy).state
    assert any(key.startswith("fisher/") for key in state)
    (first.path / "strategy.safetensors").unlink()
    with pytest.raises(LineageError, match="--keep_carries all"):
        run.store.parent_at(1, create_strategy)
