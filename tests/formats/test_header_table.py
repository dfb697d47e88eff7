"""Every ss_* key as sd-scripts would say it, on the four ways to give data; chains on odd files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lora_samples import load_tool, mixed_adapter
from toy_runs import draw_pictures

from lcp_plugin.cli import main
from lcp_plugin.formats.lora_file import lora_tensors, read_lora, write_lora
from lcp_plugin.formats.tensors import read_header, write_tensors

COMMON = ("ss_steps", "ss_max_train_steps", "ss_num_epochs", "ss_epoch", "ss_num_batches_per_epoch")
FLAT = ("ss_batch_size_per_device", "ss_bucket_info", "ss_keep_tokens", "ss_min_bucket_reso")


def run(folder: Path, base: Path, name: str, *more: str) -> dict[str, str]:
    """A small run from the command line; its header."""
    given = f"--pretrained_model_name_or_path {base} --output_dir {folder} --output_name {name} "
    given += "--network_dim 2 --resolution 32 --samples_per_task 0 --seed 3 --learning_rate 1e-3"
    assert main([*given.split(), *more]) == 0
    return dict(read_header(folder / f"{name}.safetensors").metadata)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two concepts (3 images x 2, 2 x 1), one of them captioned, and metadata of the first."""
    root = tmp_path / "data"
    cat = draw_pictures(root / "2_sks cat", 3)
    draw_pictures(root / "1_zwz dog", 2, "teal")
    (cat / "00.txt").write_text("sks cat, Grass")
    entries = {p.stem: {"caption": "", "tags": "sks cat, sun"} for p in cat.glob("*.png")}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    sub = "\n[[datasets.subsets]]\nimage_dir = {!r}\nnum_repeats = {}\nclass_tokens = {!r}\n"
    text = "[[datasets]]\nbatch_size = 2\nresolution = 32\nenable_bucket = true\n"
    text += "min_bucket_reso = 32\nmax_bucket_reso = 64\nbucket_reso_steps = 8\n"
    text += sub.format(str(cat), 2, "sks cat") + "flip_aug = true\n"
    (tmp_path / "sets.toml").write_text(text)
    return tmp_path


WAYS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    # way: its options, images with repeats, dataset_dirs, tag_frequency
    "folders": (
        "--train_data_dir {}/data",
        8,
        {"1_zwz dog": (1, 2), "2_sks cat": (2, 3)},
        {"1_zwz dog": {"zwz dog": 2}, "2_sks cat": {"sks cat": 3, "grass": 1}},
    ),
    "dataset_config": (
        "--dataset_config {}/sets.toml",
        6,
        {"2_sks cat": (2, 3)},
        {"2_sks cat": {"sks cat": 3, "grass": 1}},
    ),
    "in_json": (
        "--in_json {0}/meta.json --train_data_dir {0}/data/2_sks§cat --dataset_repeats 4",
        12,
        {"meta.json": (4, 3)},
        {"meta.json": {"sks cat": 3, "sun": 3}},
    ),
}


@pytest.mark.parametrize("way", [*WAYS, "tasks"])
def test_every_key_says_what_was_trained(folders: Path, toy_base: Path, way: str) -> None:
    if way == "tasks":
        table = (
            f'[[tasks]]\nname = "cat"\nconcept = "sks cat"\nimage_dir = "{folders}/data/2_sks cat"'
        )
        (folders / "run.toml").write_text(table + '\ntrain_prompt = "sks cat"\n')
        text, images = "--config {}/run.toml", 3
        dirs: dict[str, Any] = {"2_sks cat": (1, 3)}
        tags: dict[str, Any] = {"2_sks cat": {"sks cat": 3, "grass": 1}}
    else:
        text, images, dirs, tags = WAYS[way]
    options = [o.replace("§", " ") for o in text.format(folders).split()]
    options += ["--max_train_epochs", "2", "--caption_extension", ".txt"]
    options += ["--network_args", "rank_dropout=0", "--text_encoder_lr", "1e-4"]
    header = run(folders / "out", toy_base, "run", *options)
    batches = 3 if way == "dataset_config" else images
    counts = (2 * batches, 2 * batches, 2, 2, batches)
    assert tuple(int(header[key]) for key in COMMON) == counts
    assert header["ss_num_train_images"] == str(images)
    found = {n: (d["n_repeats"], d["img_count"]) for n, d in _json(header, "dataset_dirs").items()}
    assert found == dirs
    assert _json(header, "tag_frequency") == tags
    assert _json(header, "network_args") == {"rank_dropout": "0"}
    assert header["ss_text_encoder_lr"] == "0.0001"
    assert float(header["ss_training_started_at"]) <= float(header["ss_training_finished_at"])
    assert float(header["ss_training_started_at"]) > 1.6e9
    assert header["ss_session_id"].isdecimal()
    assert header["ss_output_name"] == "run"
    if way == "dataset_config":
        assert not [key for key in FLAT if key in header]
        (told,) = _json(header, "datasets")
        assert (told["batch_size_per_device"], told["enable_bucket"]) == (2, True)
        assert told["num_train_images"] == 6
        assert (told["min_bucket_reso"], told["max_bucket_reso"]) == (32, 64)
        (subset,) = told["subsets"]
        assert (subset["flip_aug"], subset["image_dir"]) == (True, "2_sks cat")
    else:
        assert [header[key] for key in FLAT[:1] + FLAT[2:]] == ["1", "0", "None"]
        assert header["ss_resolution"] == "(32, 32)"


def _json(header: dict[str, str], key: str) -> Any:
    return json.loads(header[f"ss_{key}"])


def test_a_file_without_metadata_for_rates_says_none(folders: Path, toy_base: Path) -> None:
    header = run(
        folders / "out",
        toy_base,
        "run",
        "--train_data_dir",
        f"{folders}/data",
        "--max_train_steps=1",
    )
    assert header["ss_text_encoder_lr"] == "None"


def test_a_merge_and_a_foreign_file_of_the_tasks_name_are_gone_on_from(
    folders: Path, toy_base: Path
) -> None:
    data = ("--train_data_dir", f"{folders}/data", "--max_train_steps=1")
    out = folders / "out"
    run(out, toy_base, "w", *data)
    adapter = read_lora(out / "w.safetensors").adapter
    for name in ("a", "b"):
        write_lora(folders / f"{name}.safetensors", adapter)
    merged = folders / "ab.safetensors"
    parts = [str(folders / f"{name}.safetensors") for name in ("a", "b")]
    assert load_tool("merge_adapters").main([*parts, "-o", str(merged), "--quiet"]) == 0
    header = read_header(merged).metadata
    assert "ss_training_started_at" not in header  # front ends read a number there
    chained = run(out, toy_base, "x", *data, "--prev", str(merged))
    assert [t["name"] for t in _json(chained, "lcp_tasks")] == ["a", "b", "x"]
    chained = run(out, toy_base, "a", *data, "--prev", parts[0], "--strategy=merge_init")
    assert [t["name"] for t in _json(chained, "lcp_tasks")] == ["a_before", "a"]


def test_a_runs_folder_gives_toml_with_its_images(
    folders: Path, toy_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folders / "out"
    run(out, toy_base, "w", "--dataset_config", f"{folders}/sets.toml", "--max_train_steps=1")
    capsys.readouterr()
    assert load_tool("lineage").main([str(out / "w"), "--toml"]) == 0
    text = capsys.readouterr().out
    (folders / "again.toml").write_text(text)
    assert main(["--config", str(folders / "again.toml"), "--dry_run"]) == 0


def test_sd_scripts_nulls_are_left_out_and_lycoris_hash_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_args": '{"conv_dim": "4", "dropout": null}',
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))",
        "sshs_model_hash": "0x" + "ab" * 32,
    }
    path = tmp_path / "k.safetensors"
    write_tensors(path, lora_tensors(mixed_adapter()), header)
    tool = load_tool("lineage")
    assert tool.main([str(path)]) == 0
    assert "not checked" in capsys.readouterr().out
    assert tool.main([str(path), "--toml"]) == 0
    text = capsys.readouterr().out
    assert 'network_args = ["conv_dim=4"]' in text
    assert 'network_module = "networks.lora"' in text
    assert 'optimizer_args = ["weight_decay=0.1", "betas=(0.9, 0.99)"]' in text
    assert 'optimizer_type = "AdamW"' in text


@pytest.mark.parametrize(
    ("recorded", "optimizer"),
    [
        ("bitsandbytes.optim.lion.Lion8bit(betas=(0.9, 0.95))", "Lion8bit"),
        ("prodigyopt.prodigy.Prodigy", "Prodigy"),
        ("mine.optimizers.AdamW(lr=1)", "mine.optimizers.AdamW"),  # nobody else's AdamW
        ("pytorch_optimizer.optimizer.came.CAME", "pytorch_optimizer.optimizer.came.CAME"),
    ],
)
def test_an_optimizer_comes_back_by_the_name_that_finds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recorded: str, optimizer: str
) -> None:
    path = tmp_path / "k.safetensors"
    header = {"ss_network_module": "networks.lora", "ss_optimizer": recorded}
    write_tensors(path, lora_tensors(mixed_adapter()), header)
    assert load_tool("lineage").main([str(path), "--toml"]) == 0
    assert f'optimizer_type = "{optimizer}"' in capsys.readouterr().out
