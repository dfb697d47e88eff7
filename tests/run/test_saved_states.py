"""What a run writes on its way: intermediate files, states to go on from, samples, validation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toy_runs import first_adapter, names_in

from lcp_plugin.errors import ConfigError, ResumeError
from lcp_plugin.formats.lora_file import read_lora
from lcp_plugin.formats.tensors import read_header
from lcp_plugin.observers.jsonl import read_steps, read_validation

Train = Callable[..., Any]


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
