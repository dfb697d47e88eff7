"""kohya's options through whole runs on a toy base: each is set, and what it should change changes.

(What needs no run, such as batches, losses and schedules, is in test_option_effects.)
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import toml
import torch
from PIL import Image
from torch import Tensor, nn

from lcp_plugin.adapter import Adapter, Factors
from lcp_plugin.cli import main
from lcp_plugin.errors import ConfigError, LcpError, LineageError, ResumeError
from lcp_plugin.formats.identity import file_model_hash
from lcp_plugin.formats.lora_file import read_lora, write_lora
from lcp_plugin.formats.tensors import read_header, read_tensors
from lcp_plugin.observers.jsonl import read_steps, read_validation

Train = Callable[..., Any]
WriteConfig = Callable[..., Path]


def first_adapter(run: Any) -> Adapter:
    adapter: Adapter = run.store.folders()[0].read_adapter()
    return adapter


def rates_of(run: Any) -> list[float]:
    return [step["lr"] for step in read_steps(run.store.root / "logs" / "steps.jsonl")]


def losses_of(run: Any) -> list[float]:
    return [step["loss"] for step in read_steps(run.store.root / "logs" / "steps.jsonl")]


@pytest.fixture
def trainer(toy_base: Path) -> Callable[..., Any]:
    """trainer(**options) -> a Trainer on the toy base, without a run."""

    def make(**given: Any) -> Any:
        from lcp_plugin.config.options import Options
        from lcp_plugin.sdxl.load import load_pipeline
        from lcp_plugin.sdxl.precision import weight_dtype
        from lcp_plugin.training.processes import create_accelerator
        from lcp_plugin.training.trainer import Trainer

        options = Options(**{"network_train_unet_only": True, "learning_rate": 0.1, **given})
        pipeline = load_pipeline(str(toy_base), weight_dtype(options))
        return Trainer(options, pipeline, create_accelerator(options.mixed_precision), 7)

    return make


def attach(trainer: Any, **overrides: Any) -> list[dict[str, Any]]:
    """Puts a fresh adapter on and returns the optimizer's groups."""
    from dataclasses import replace

    from lcp_plugin.tasks import Task

    options = replace(trainer.options, **overrides)
    task = Task(1, "a", "object", "a", ())
    trainer.adapted.attach(trainer.spec(task, options).gaussian())
    groups: list[dict[str, Any]] = trainer.make_groups(options)
    return groups


# ------------------------------------------------------------------------------- which modules


def test_conv_dim_adapts_residual_blocks_at_ranks_of_their_own(train: Train) -> None:
    args = ["conv_dim=3", "conv_alpha=1.5"]
    adapter = first_adapter(train("run", tasks=(0,), lora_targets="transformer", network_args=args))
    wide = {n: f for n, f in adapter.items() if f.kernel == (3, 3)}
    assert any(".resnets." in name for name in wide)
    assert {(f.rank, f.alpha) for f in wide.values()} == {(3, 1.5)}
    assert {f.rank for f in adapter.values() if f.kernel is None} == {2}
    assert any(bool(f.up.any()) for f in wide.values())


def test_block_dims_and_alphas_hold_block_by_block(trainer: Callable[..., Any]) -> None:
    from lcp_plugin.config.network_args import block_index
    from lcp_plugin.formats.keys import to_sgm

    dims, alphas = [*range(1, 24)], [0.5 * i for i in range(1, 24)]
    args = (f"block_dims={','.join(map(str, dims))}", f"block_alphas={','.join(map(str, alphas))}")
    held = trainer(network_args=args)
    attach(held)
    for name, factors in held.adapted.trained().items():
        block = block_index(to_sgm(name.removeprefix("unet.")))
        assert (factors.rank, factors.alpha) == (dims[block], alphas[block]), name


def test_blocks_without_a_rate_are_not_adapted(trainer: Callable[..., Any]) -> None:
    held = trainer(network_args=("mid_lr_weight=0,0,0", "up_lr_weight=.5,.5,.5,.5,.5,.5,.5,.5,.5"))
    groups = attach(held)
    names = set(held.adapted.pair_of)
    assert names
    assert not any(name.startswith("unet.mid_block") for name in names)
    assert {group["lr"] for group in groups} <= {0.1, 0.05}
    assert 0.05 in {group["lr"] for group in groups}


def test_lora_plus_trains_b_faster(trainer: Callable[..., Any]) -> None:
    held = trainer(network_args=("loraplus_lr_ratio=4",))
    groups = {group["lr"]: group["params"] for group in attach(held)}
    assert set(groups) == {0.1, 0.4}
    ups = {id(pair.up) for pair in held.adapted.pair_of.values()}
    assert {id(p) for p in groups[0.4]} == ups


def test_parts_have_rates_of_their_own_and_none_means_untrained(
    trainer: Callable[..., Any],
) -> None:
    given = {"network_train_unet_only": False, "unet_lr": 0.3}
    held = trainer(**given, text_encoder_lr=(0.1, 0.2))
    assert {group["lr"] for group in attach(held)} == {0.1, 0.2, 0.3}
    held = trainer(**given, text_encoder_lr=(0.1, 0.0))
    attach(held)
    assert {n.split(".")[0] for n in held.adapted.pair_of} == {"unet", "text_encoder"}


def test_text_encoders_alone_are_trained(train: Train) -> None:
    run = train(
        "run",
        tasks=(0,),
        network_train_unet_only=False,
        network_train_text_encoder_only=True,
        cache_text_encoder_outputs=False,
    )
    assert {n.split(".")[0] for n in first_adapter(run)} == {"text_encoder", "text_encoder_2"}


@pytest.mark.parametrize(
    "options",
    [
        {"network_dropout": 0.5},
        {"network_args": ["rank_dropout=0.5"]},
        {"network_args": ["module_dropout=0.5"]},
    ],
    ids=["network", "rank", "module"],
)
def test_dropout_changes_what_is_learned_and_repeats(train: Train, options: dict[str, Any]) -> None:
    plain = first_adapter(train("plain", tasks=(0,)))
    first, again = (first_adapter(train(n, tasks=(0,), **options)) for n in ("one", "two"))
    assert any(not torch.equal(first[n].up, plain[n].up) for n in plain)
    assert all(torch.equal(first[n].up, again[n].up) for n in first)


# --------------------------------------------------------------------------------- how it starts


def test_network_module_means_kohyas_targets_and_start(train: Train) -> None:
    run = train("run", tasks=(0,), network_module="networks.lora", learning_rate=1e-12)
    adapter = first_adapter(run)
    assert any(name.endswith("proj_in") for name in adapter)
    for factors in adapter.values():  # kaiming_uniform, a = sqrt(5): uniform within 1 / sqrt(in)
        assert float(factors.down.abs().max()) <= 1 / math.sqrt(factors.down.shape[1]) + 1e-6
    assert run.store.folders()[0].lineage["strategy"]["args"] == ["init=kaiming"]


def test_a_given_start_wins_and_a_chain_may_differ_in_it(train: Train) -> None:
    first = train("first", tasks=(0,), network_module="networks.lora", strategy_args=["init=unit"])
    assert first.store.folders()[0].lineage["strategy"]["args"] == ["init=unit"]
    second = train("second", tasks=(1,), prev=str(first.store.root), lora_init="gaussian")
    assert second.store.folders()[0].lineage["strategy"]["args"] == ["init=gaussian"]


def test_no_update_is_larger_than_scale_weight_norms(train: Train) -> None:
    free = first_adapter(train("free", tasks=(0,)))
    held = first_adapter(train("held", tasks=(0,), scale_weight_norms=0.01))
    assert max(float(f.update().norm()) for f in free.values()) > 0.011
    assert max(float(f.update().norm()) for f in held.values()) <= 0.01 * (1 + 1e-4)


def test_network_weights_go_on_with_their_own_rank_and_alpha(train: Train, tmp_path: Path) -> None:
    parent = train("parent", tasks=(0,), network_dim=3, network_alpha=1.5, strategy="naive")
    file = parent.store.deliverable
    run = train("run", tasks=(1,), network_weights=str(file), learning_rate=1e-12)
    before, after = read_lora(file), read_lora(run.store.deliverable)
    assert before.total.keys() == after.total.keys()
    for name, entry in before.total.items():
        assert torch.allclose(entry.dense(), after.total[name].dense(), atol=1e-5)
    assert {(f.rank, f.scale) for f in first_adapter(run).values()} == {(3, 0.5)}
    assert after.metadata["ss_network_dim"] == "3"
    (source,) = json.loads(after.metadata["ss_lcp_parents"])
    assert source["hash"] == file_model_hash(file)


def test_what_network_weights_change_and_the_run_does_not_train_is_kept(
    train: Train, tmp_path: Path
) -> None:
    both = {"network_train_unet_only": False, "cache_text_encoder_outputs": False}
    parent = train("parent", tasks=(0,), **both)
    run = train("run", tasks=(1, 2), network_weights=str(parent.store.deliverable))
    before, after = read_lora(parent.store.deliverable), read_lora(run.store.deliverable)
    text = [name for name in before.total if name.startswith("text_encoder")]
    assert text
    for name in text:
        assert torch.allclose(before.total[name].dense(), after.total[name].dense(), atol=1e-6)
    assert not any(name.startswith("text_encoder") for name in first_adapter(run))


def test_dim_from_weights_trains_the_modules_of_the_file_only(train: Train, tmp_path: Path) -> None:
    parent = first_adapter(train("parent", tasks=(0,), network_dim=3))
    kept = parent.restrict([name for name in parent if name.endswith("to_q")])
    path = tmp_path / "queries.safetensors"
    write_lora(path, kept)
    run = train("run", tasks=(1, 2), network_weights=str(path), dim_from_weights=True)
    for folder in run.store.folders():
        adapter = folder.read_adapter()
        assert set(adapter) == set(kept)
        assert {f.rank for f in adapter.values()} == {3}


def test_network_weights_and_prev_exclude_each_other(train: Train) -> None:
    parent = train("parent", tasks=(0,))
    file = str(parent.store.deliverable)
    with pytest.raises(ConfigError, match="keep one"):
        train("run", tasks=(1,), network_weights=file, prev=file)


# ---------------------------------------------------------------------------------- base_weights


def predict(trainer: Any) -> Tensor:
    """The UNet's output for fixed inputs."""
    from lcp_plugin.sdxl.live import run_unet

    unet = trainer.pipeline.unet
    generator = torch.Generator().manual_seed(0)
    batch = {
        "encoder_hidden_states": torch.randn(
            1, 77, unet.config.cross_attention_dim, generator=generator
        ),
        "text_embeds": torch.randn(
            1, trainer.pipeline.text_encoder_2.config.projection_dim, generator=generator
        ),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    }
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return run_unet(trainer.adapted, latents, torch.tensor([500]), batch, trainer.dtype)


def first_linear(module: nn.Module) -> Any:
    return next(m for m in module.modules() if isinstance(m, nn.Linear))


def random_lora(trainer: Any, path: Path, size: float = 0.1) -> Path:
    """A LoRA of two modules with random factors."""
    from lcp_plugin.sdxl.layers import choose_targets, layer_shape

    layers, generator = trainer.adapted.layers, torch.Generator().manual_seed(1)
    factors = {}
    for name in choose_targets(layers, "attention")[:2]:
        out, inputs = layer_shape(layers[name])
        down, up = (torch.randn(s, generator=generator) for s in ((2, inputs), (out, 2)))
        factors[name] = Factors(down, size * up, 2.0)
    write_lora(path, Adapter(factors))
    return path


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_base_weights_belong_to_the_base_with_their_multiplier(
    trainer: Callable[..., Any], tmp_path: Path, precision: str
) -> None:
    plain = trainer(mixed_precision=precision)
    path = random_lora(plain, tmp_path / "style.safetensors")
    given = {"base_weights": (str(path),), "base_weights_multiplier": (0.5,)}
    moved = predict(trainer(mixed_precision=precision, **given))
    before = predict(plain)
    plain.adapted.set_base(read_lora(path).total.weighted(0.5), "branch")
    expected = predict(plain)
    assert float((expected - before).abs().max()) > 1e-2
    assert float((moved - expected).abs().max()) < (1e-4 if precision == "no" else 2e-2)


def test_base_weights_are_hashed_into_the_base_and_never_delivered(
    train: Train, trainer: Callable[..., Any], tmp_path: Path
) -> None:
    path = random_lora(trainer(), tmp_path / "style.safetensors")
    plain = train("plain", tasks=(0,))
    run = train("run", tasks=(0,), base_weights=[str(path)], learning_rate=1e-12)
    assert run.base.hash != plain.base.hash
    assert "style.safetensors" in run.base.name
    delivered = read_lora(run.store.deliverable).total
    assert max(float(entry.dense().abs().max()) for entry in delivered.values()) < 1e-6
    with pytest.raises(LineageError, match="Chain runs on one base"):
        train("next", tasks=(1,), prev=str(run.store.root))
    chained = train("next2", tasks=(1,), prev=str(run.store.root), base_weights=[str(path)])
    assert chained.store.folders()[-1].index == 2


# --------------------------------------------------------------------- files, states and samples


def names_in(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_files_are_saved_every_n_steps_and_rotate(train: Train, tmp_path: Path) -> None:
    options = {"save_every_n_steps": 2, "save_last_n_steps": 2, "max_train_steps": 7}
    run = train("run", tasks=(0, 1), **options)
    wanted = [
        f"run-{task}-step0000000{step}.safetensors"
        for task in ("01_disc0", "02_disc1")
        for step in (4, 6)
    ]
    assert names_in(tmp_path / "out", "run-*") == wanted
    path = tmp_path / "out" / wanted[-1]
    metadata = read_header(path).metadata
    assert [t["name"] for t in json.loads(metadata["ss_lcp_tasks"])] == ["disc0", "disc1"]
    shorter = train("shorter", tasks=(0, 1), max_train_steps=7)
    assert (
        run.store.folders()[-1].lineage["hashes"] == shorter.store.folders()[-1].lineage["hashes"]
    )


def test_an_intermediate_file_is_the_model_at_that_step(train: Train, tmp_path: Path) -> None:
    train("long", tasks=(0,), save_every_n_epochs=1, max_train_steps=7)
    short = train("short", tasks=(0,), max_train_steps=3)  # an epoch: three pictures, one a step
    assert names_in(tmp_path / "out", "long-*") == [
        "long-000001.safetensors",
        "long-000002.safetensors",
    ]
    early = read_lora(tmp_path / "out" / "long-000001.safetensors").total
    whole = read_lora(short.store.deliverable).total
    for name in whole:
        assert torch.equal(early[name].dense(), whole[name].dense())


def test_a_run_goes_on_from_a_saved_state(train: Train, tmp_path: Path) -> None:
    options = {"save_every_n_steps": 2, "optimizer_type": "AdamW"}
    whole = train("whole", tasks=(0,), max_train_steps=5, save_state=True, **options)
    assert names_in(tmp_path / "out", "whole-*-state") == [
        "whole-step00000002-state",
        "whole-step00000004-state",
    ]
    assert (tmp_path / "out" / "whole-state" / "state.json").is_file()
    state = str(tmp_path / "out" / "whole-step00000002-state")
    again = train("again", tasks=(0,), max_train_steps=5, resume=state)
    steps = [s["step"] for s in read_steps(again.store.root / "logs" / "steps.jsonl")]
    assert steps == [3, 4, 5]
    a, b = first_adapter(whole), first_adapter(again)
    assert all(torch.equal(a[n].up, b[n].up) and torch.equal(a[n].down, b[n].down) for n in a)


def test_a_state_at_the_end_lets_a_run_be_longer(train: Train, tmp_path: Path) -> None:
    train("short", tasks=(0,), max_train_steps=2, save_state_on_train_end=True)
    state = str(tmp_path / "out" / "short-state")
    longer = train("longer", tasks=(0,), max_train_steps=4, resume=state)
    whole = train("whole", tasks=(0,), max_train_steps=4)
    a, b = first_adapter(longer), first_adapter(whole)
    assert all(torch.equal(a[n].up, b[n].up) for n in a)
    with pytest.raises(ResumeError, match="rank or modules differ"):
        train("other", tasks=(0,), max_train_steps=4, resume=state, network_dim=3)
    with pytest.raises(ResumeError, match="max_train_steps"):
        train("done", tasks=(0,), max_train_steps=1, resume=state)


def test_kohyas_pickled_state_is_refused_with_the_reason(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "optimizer.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match="unpickling runs code"):
        train("run", tasks=(0,), resume=str(folder))


def test_sample_prompts_are_drawn_when_they_should_be(train: Train, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog --w 32 --h 48 --d 3 --s 2 --l 2\na cat --s 2 --ss euler_a\n")
    run = train(
        "run",
        tasks=(0,),
        sample_prompts=str(prompts),
        sample_every_n_steps=2,
        sample_at_first=True,
        max_train_steps=4,
    )
    found = names_in(tmp_path / "out" / "sample", "*.png")
    starts = [f"run_{step:06d}_{number:02d}_" for step in (0, 2, 4) for number in (0, 1)]
    assert len(found) == len(starts)
    assert all(a.startswith(b) for a, b in zip(found, starts, strict=True))
    with Image.open(tmp_path / "out" / "sample" / found[0]) as image:
        assert image.size == (32, 48)
        assert image.info["prompt"] == "a dog"
    plain = train("plain", tasks=(0,), max_train_steps=4)
    a, b = first_adapter(run), first_adapter(plain)  # looking changes nothing
    assert all(torch.equal(a[n].up, b[n].up) for n in a)


def test_sample_sampler_draws_what_a_prompt_leaves_open(train: Train, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog --w 32 --h 32 --d 3 --s 2\n")
    common = {"tasks": (0,), "sample_prompts": str(prompts), "sample_at_first": True}
    drawn = {}
    for sampler in ("ddim", "euler"):
        train(sampler, sample_sampler=sampler, max_train_steps=1, **common)
        (path,) = (tmp_path / "out" / "sample").glob(f"{sampler}_*.png")
        drawn[sampler] = path.read_bytes()
        with Image.open(path) as image:
            drawn[sampler] = image.tobytes()
    assert drawn["ddim"] != drawn["euler"]


def test_max_validation_steps_measures_fewer_images(train: Train) -> None:
    common = {"tasks": (0,), "validation_split": 0.7, "max_train_steps": 1}
    runs = [
        train(name, validate_every_n_steps=1, max_validation_steps=count, **common)
        for name, count in (("all", 0), ("one", 1))
    ]
    facts = [run.store.folders()[0].lineage for run in runs]
    assert facts[0]["data"]["validation_images"] == 2
    losses = [f["training"]["validation"][0][1] for f in facts]
    assert losses[0] != losses[1]


def test_max_grad_norm_clips(train: Train) -> None:
    given = {"tasks": (0,), "optimizer_type": "SGD", "optimizer_args": ["momentum=0"]}
    sizes = []
    for name, limit in (("free", 0), ("clipped", 1e-4)):
        adapter = first_adapter(train(name, max_grad_norm=limit, max_train_steps=1, **given))
        sizes.append(sum(float(f.up.square().sum()) for f in adapter.values()) ** 0.5)
    # one SGD step from B = 0, where A has no gradient: ||B|| = rate * ||gradient||
    assert sizes[1] == pytest.approx(1e-2 * 1e-4, rel=1e-2)
    assert sizes[0] > 10 * sizes[1]


def test_held_out_images_are_measured_and_survive_a_resume(train: Train, tmp_path: Path) -> None:
    options = {"validation_split": 0.4, "validate_every_n_steps": 2, "learning_rate": 1e-3}
    run = train("run", tasks=(0,), max_train_steps=4, **options)
    facts = run.store.folders()[0].lineage
    assert [step for step, _ in facts["training"]["validation"]] == [2, 4]
    assert (facts["data"]["images"], facts["data"]["validation_images"]) == (2, 1)
    logged = read_validation(run.store.root / "logs" / "steps.jsonl")
    assert [[line["step"], line["loss"]] for line in logged] == facts["training"]["validation"]
    fewer = train("fewer", tasks=(0,), max_train_steps=2, save_state_on_train_end=True, **options)
    state = str(fewer.store.output_dir / "fewer-state")
    again = train("again", tasks=(0,), max_train_steps=4, resume=state, **options)
    later = again.store.folders()[0].lineage["training"]["validation"]
    assert later == facts["training"]["validation"]


# -------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    "options", [{"max_token_length": 150}, {"weighted_captions": True}], ids=["long", "weighted"]
)
def test_captions_may_be_long_and_weighted(
    trainer: Callable[..., Any], options: dict[str, Any]
) -> None:
    text = "a (dog:1.5)" if "weighted_captions" in options else "a dog " * 60
    plain = trainer().encode_prompts([text])["encoder_hidden_states"]
    found = trainer(**options).encode_prompts([text])["encoder_hidden_states"]
    assert found.shape[1] == (152 if "max_token_length" in options else 77)
    assert not torch.allclose(found[:, :77], plain, atol=1e-3)


def test_a_run_trains_on_long_captions(train: Train, pictures: Path) -> None:
    (pictures / "disc0" / "00.txt").write_text("a disc of many words, " * 30)
    common = {"tasks": (0,), "caption_extension": ".txt", "max_train_steps": 4}
    short, long = train("short", **common), train("long", max_token_length=225, **common)
    assert losses_of(short) != losses_of(long)


# ------------------------------------------------------------------------------- what is written


def test_the_header_says_what_kohyas_does_and_more(train: Train) -> None:
    run = train(
        "run",
        tasks=(0, 1),
        metadata_author="me",
        metadata_title="Discs",
        training_comment="hello",
        wandb_api_key="secret",
        max_timestep=800,
    )
    header = read_header(run.store.deliverable).metadata
    assert header["ss_training_comment"] == "hello"
    assert header["ss_network_dim"] == "4"  # of the file: the ranks of two tasks add up
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert header["ss_num_train_images"] == "6"
    assert header["ss_steps"] == "6"
    assert header["modelspec.author"] == "me"
    assert header["modelspec.title"] == "Discs"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.timestep_range"] == "0,800"
    assert header["modelspec.prediction_type"] == "epsilon"
    assert json.loads(header["ss_bucket_info"])["buckets"]["0"]["count"] == 3
    assert [t["name"] for t in json.loads(header["ss_lcp_tasks"])] == ["disc0", "disc1"]
    assert header["ss_lcp_base_hash"] == run.base.hash
    assert "secret" not in json.dumps(header)
    assert "secret" not in (run.store.root / "run.json").read_text()


@pytest.mark.parametrize(
    "name",
    [
        *("description", "license", "tags", "usage_hint", "thumbnail", "merged_from"),
        *("trigger_phrase", "preprocessor", "is_negative_embedding"),
    ],
)
def test_every_metadata_option_is_in_the_header(name: str) -> None:
    from lcp_plugin.hooks import Carry
    from lcp_plugin.store.deliverable_header import make_header
    from lcp_plugin.store.task_folder import TaskFolder

    record = {"index": 1, "name": "a", "kind": "object", "concept": "sks a"}
    facts = {
        "task": record,
        "tasks": [record],
        "strategy": {"name": "naive", "args": []},
        "base": {"name": "base", "hash": "0" * 64},
        "options": {f"metadata_{name}": "what I say"},
    }
    folder = TaskFolder(Path("01_a"), facts)
    header = make_header(Carry(), Adapter(), [folder], "run")
    assert header[f"modelspec.{name}"] == "what I say"


def test_pickles_are_asked_for_and_safetensors_are_written(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(write_config("run", tasks=(0,), save_model_as="ckpt"))]) == 0
    assert "saved as safetensors" in capsys.readouterr().err
    assert [p.suffix for p in (tmp_path / "out").iterdir() if p.is_file()] == [".safetensors"]


def test_no_metadata_leaves_what_readers_need(train: Train) -> None:
    run = train("run", tasks=(0,), no_metadata=True, training_comment="hello")
    header = read_header(run.store.deliverable).metadata
    assert header["ss_network_dim"] == "2"
    assert "ss_training_comment" not in header
    assert not any(key.startswith("ss_lcp_") for key in header)
    chained = train("next", tasks=(1,), prev=str(run.store.deliverable))
    assert chained.store.folders()[-1].index == 2


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float", torch.float32), ("fp32", torch.float32), ("fp16", torch.float16)],
)
def test_save_precision_is_the_deliverables(
    train: Train, precision: str, dtype: torch.dtype
) -> None:
    run = train("run", tasks=(0,), save_precision=precision)
    tensors = read_tensors(run.store.deliverable)
    assert {t.dtype for k, t in tensors.items() if "lora_up" in k} == {dtype}


def test_output_config_writes_the_given_options_and_stops(
    tmp_path: Path, toy_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    flags = ["--output_config", "--config_file", str(path), "--network_dim", "8"]
    assert main(flags) == 0
    assert toml.loads(path.read_text()) == {"network_dim": 8}
    assert main(flags) == 2
    assert "exists" in capsys.readouterr().err


def test_console_log_file_takes_the_messages(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "logs" / "run.log"
    config = write_config("run", tasks=(0,), blocks_to_swap=3, console_log_file=str(log))
    assert main(["--config", str(config)]) == 0
    assert log.read_text().count("blocks_to_swap has no effect") == 1
    assert "blocks_to_swap" not in capsys.readouterr().err
    logging.basicConfig(force=True)


def test_console_log_level_hides_notices(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config("run", tasks=(0,), blocks_to_swap=3, console_log_level="ERROR")
    assert main(["--config", str(config)]) == 0
    assert "blocks_to_swap" not in capsys.readouterr().err
    logging.basicConfig(force=True)


def test_a_log_file_that_cannot_be_written_is_one_line(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config("run", tasks=(0,), console_log_file=str(tmp_path))
    assert main(["--config", str(config)]) == 2
    assert "console_log_file" in capsys.readouterr().err


def test_notices_are_said_once_and_not_again_when_a_run_goes_on(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(write_config("run", tasks=(0,), blocks_to_swap=3))]) == 0
    assert capsys.readouterr().err.count("blocks_to_swap has no effect") == 1
    assert main(["--config", str(write_config("run", tasks=(0, 1), blocks_to_swap=3))]) == 0
    assert "blocks_to_swap" not in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_one_notice(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    run = train("run", tasks=(0,), log_with="tensorboard", logging_dir=str(tmp_path / "logs"))
    assert run.facts["said"] == [
        "log_with = tensorboard: nothing is logged; pip install tensorboard."
    ]


def test_a_tracker_gets_options_losses_and_the_validation_loss(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import GeneralTracker

    from lcp_plugin.run import runner

    rows: list[tuple[dict[str, Any], int | None]] = []
    told: dict[str, Any] = {}

    class Fake(GeneralTracker):  # type: ignore[misc]
        name = "fake"
        requires_logging_directory = False

        def __init__(self) -> None:
            super().__init__()

        @property
        def tracker(self) -> None:
            return None

        def start(self) -> None:
            told["started"] = True

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.update(values)

        def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
            rows.append((values, step))

    fake = Fake()
    monkeypatch.setattr(runner, "usable_trackers", lambda settings: [fake] if settings else [])
    train(
        "run",
        tasks=(0,),
        log_with="tensorboard",
        logging_dir=str(tmp_path / "logs"),
        log_prefix="mine_",
        log_config=True,
        validation_split=0.4,
        validate_every_n_steps=3,
    )
    assert told["started"]
    assert told["network_dim"] == 2
    assert "wandb_api_key" not in told
    assert [step for values, step in rows if "loss/disc0" in values] == [1, 2, 3]
    assert [step for values, step in rows if "loss/validation/disc0" in values] == [3]
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("mine_")


# --------------------------------------------------------------------------- precision and speed


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fp8_base_stores_a_byte_a_weight_and_predicts_alike(
    trainer: Callable[..., Any], precision: str
) -> None:
    from lcp_plugin.sdxl.stored import FLOAT8

    plain = trainer(mixed_precision=precision)
    before = predict(plain)
    small = trainer(mixed_precision=precision, fp8_base_unet=True)
    layers = [m for m in small.pipeline.unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert all(m.stored.dtype is FLOAT8 for m in layers)
    assert all(m.weight.untyped_storage().nbytes() <= 8 for m in layers)
    assert not hasattr(first_linear(small.pipeline.text_encoder), "stored")
    after = predict(small)
    error = float((after - before).norm() / before.norm())
    assert 0 < error < 0.2  # three bits of mantissa: 3% a weight
    rounded = {  # what a base with rounded weights predicts, stored in full
        name: m.weight.data.float().to(FLOAT8).to(m.weight.dtype)
        for name, m in plain.pipeline.unet.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }
    for name, m in plain.pipeline.unet.named_modules():
        if name in rounded:
            m.weight.data = rounded[name]
    assert torch.equal(predict(plain), after)


def test_fp8_text_encoders_stay_small_when_they_move(trainer: Callable[..., Any]) -> None:
    held = trainer(fp8_base=True)
    layer = first_linear(held.pipeline.text_encoder)
    held.pipeline.text_encoder.to("cpu").to(torch.float64).to(torch.float32)
    assert layer.stored.dtype is torch.float8_e4m3fn
    assert layer.weight.untyped_storage().nbytes() <= 8
    states = held.encode_prompts(["a dog"])["encoder_hidden_states"]
    assert bool(torch.isfinite(states).all())


def test_a_chain_on_an_fp8_base_delivers_updates_in_full(train: Train) -> None:
    run = train("run", tasks=(0, 1), fp8_base=True, strategy="merge_init")
    last = run.store.folders()[-1]
    assert last.lineage["training"]["fused"]["fused"] == 0  # nothing is rounded into float8
    total = last.read_carry().total
    expected = [f.read_adapter() for f in run.store.folders()]
    for name in total:
        summed = expected[0][name].update() + expected[1][name].update()
        assert torch.allclose(total[name].dense(), summed, atol=1e-6)


def test_full_bf16_keeps_factors_in_bf16(trainer: Callable[..., Any], train: Train) -> None:
    run = train("run", tasks=(0,), mixed_precision="bf16", full_bf16=True)
    plain = train("plain", tasks=(0,), mixed_precision="bf16")
    full, half = first_adapter(plain), first_adapter(run)
    assert all(torch.equal(f.up, f.up.bfloat16().float()) for f in half.values())
    assert any(not torch.equal(f.up, f.up.bfloat16().float()) for f in full.values())


def test_full_fp16_lets_the_scaler_unscale_half_gradients() -> None:
    from lcp_plugin.sdxl.precision import allow_half_gradients

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # makes its scale a tensor
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float16))
    parameter.grad = torch.full((2,), 16.0, dtype=torch.float16)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    with pytest.raises(ValueError, match="FP16"):
        scaler.unscale_(optimizer)
    allow_half_gradients(scaler)
    scaler._per_optimizer_states.clear()
    scaler.unscale_(optimizer)
    assert parameter.grad.tolist() == [2.0, 2.0]


def test_the_vae_runs_in_fp32_whatever_the_precision(trainer: Callable[..., Any]) -> None:
    for given in ({}, {"no_half_vae": True}):
        held = trainer(mixed_precision="bf16", **given)
        assert held.pipeline.vae.dtype is torch.float32
        assert held.pipeline.unet.dtype is torch.bfloat16


def test_torch_compile_goes_through_the_backend_that_is_named(
    trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo import config

    asked: list[str] = []
    monkeypatch.setattr(config, "skip_nnmodule_hook_guards", True)
    monkeypatch.setattr(nn.Module, "compile", lambda self, backend: asked.append(backend))
    trainer()
    assert asked == []
    trainer(torch_compile=True, dynamo_backend="aot_eager")
    assert asked == ["aot_eager"]
    assert not config.skip_nnmodule_hook_guards  # else adapters put on later are not seen


# ---------------------------------------------------------------------------- loss and schedules


def test_output_preservation_holds_what_the_model_said(
    train: Train, pictures: Path, tmp_path: Path
) -> None:
    def dataset(preserve: bool) -> dict[str, Any]:
        subset = {"image_dir": "disc0", "class_tokens": "disc"}
        if preserve:
            subset = {**subset, "custom_attributes": {"diff_output_preservation": True}}
        return {
            "name": "disc0",
            "kind": "object",
            "concept": "disc",
            "datasets": [{"subsets": [subset]}],
        }

    free = train("free", tasks=[dataset(False)])
    held = train("held", tasks=[dataset(True)])
    assert losses_of(free)[0] > 1e-3
    assert losses_of(held)[0] < 1e-9  # at step 0 the model says what it said before the task
    size = [max(float(f.update().norm()) for f in first_adapter(r).values()) for r in (free, held)]
    assert size[1] < 1e-3 * size[0]


def test_v_prediction_is_recognised_from_the_base(
    train: Train, toy_base: Path, tmp_path: Path
) -> None:
    import shutil

    other = tmp_path / "v_base"
    shutil.copytree(toy_base, other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"})
    )
    run = train("run", tasks=(0,), pretrained_model_name_or_path=str(other))
    assert any("predicts v" in line for line in run.facts["said"])
    given = train("given", tasks=(0,), v_parameterization=True)
    assert losses_of(run) == losses_of(given)
    assert not any("predicts v" in line for line in given.facts["said"])
    header = read_header(run.store.deliverable).metadata
    assert header["modelspec.prediction_type"] == "v"


def test_v_prediction_and_zero_terminal_snr_hold_for_samples_too(
    trainer: Callable[..., Any],
) -> None:
    held = trainer(v_parameterization=True, zero_terminal_snr=True)
    scheduler = held.pipeline.scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr
    assert float(held.alphas[-1]) == pytest.approx(0, abs=1e-9)
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    assert float(trainer().alphas[-1]) > 1e-3


def test_anyones_scheduler_sets_the_rates_and_a_resumed_run_agrees(
    train: Train, tmp_path: Path
) -> None:
    options = {
        "lr_scheduler_type": "torch.optim.lr_scheduler.StepLR",
        "lr_scheduler_args": ["step_size=2", "gamma=0.1"],
        "learning_rate": 1e-2,
    }
    run = train(
        "run", tasks=(0,), max_train_steps=5, save_state=True, save_every_n_steps=3, **options
    )
    expected = [1e-2, 1e-2, 1e-3, 1e-3, 1e-4]
    assert rates_of(run) == pytest.approx(expected)
    state = str(tmp_path / "out" / "run-step00000003-state")
    again = train("again", tasks=(0,), max_train_steps=5, resume=state, **options)
    assert rates_of(again) == pytest.approx(expected[3:])


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"lr_scheduler_type": "nothing.Here"}, "cannot be imported"),
        ({"lr_scheduler_type": "StepLR"}, "do not fit"),
        (
            {
                "lr_scheduler_type": "ReduceLROnPlateau",
                "lr_scheduler_args": ("mode='min'",),
            },
            "more than the step",
        ),
    ],
    ids=["unknown", "arguments", "metric"],
)
def test_a_scheduler_that_cannot_be_used_is_one_line(given: dict[str, Any], word: str) -> None:
    from lcp_plugin.config.options import Options
    from lcp_plugin.training.schedules import RateSchedule, make_course

    with pytest.raises(LcpError, match=word):
        make_course(RateSchedule.of(Options(**given)), 10, [1.0])(1)


def test_schedule_free_optimizers_are_told_which_weights_are_wanted() -> None:
    from lcp_plugin.sdxl.precision import set_mode

    class Free:
        modes: Sequence[str] = ()

        def train(self) -> None:
            self.modes = (*self.modes, "train")

        def eval(self) -> None:
            self.modes = (*self.modes, "eval")

    optimizer = Free()
    set_mode(optimizer, "train")
    set_mode(optimizer, "eval")
    set_mode(object(), "eval")  # others have one set
    assert optimizer.modes == ("train", "eval")


def test_a_large_deliverable_is_pointed_out(train: Train) -> None:
    from lcp_plugin.run.runner import summarise

    run = train("run", tasks=(0,), max_file_size="1KB")
    assert "lora:RANK" in summarise(run)


def test_running_out_of_memory_names_the_flags_that_help(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcp_plugin.run import runner

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner, "load_pipeline", full)
    assert main(["--config", str(write_config("run", tasks=(0,)))]) == 1
    text = capsys.readouterr().err
    assert "--gradient_checkpointing" in text
    assert "Traceback" not in text
