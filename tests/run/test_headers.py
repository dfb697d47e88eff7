"""What a deliverable's header says, its precision and its size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lcp_plugin.adapter import Adapter
from lcp_plugin.cli import main
from lcp_plugin.formats.tensors import read_header, read_tensors

Train = Callable[..., Any]


WriteConfig = Callable[..., Path]


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
    assert header["ss_lcp_base_hash"] == run.plan.base_id.hash
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


def test_a_large_deliverable_is_pointed_out(train: Train) -> None:
    from lcp_plugin.run.follow_up import sum_up_run

    run = train("run", tasks=(0,), max_file_size="1KB")
    assert "lora:RANK" in sum_up_run(run)
