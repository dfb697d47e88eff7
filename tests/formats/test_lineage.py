"""What headers say: ours, kohya's, OneTrainer's; and the TOML that would train a file again."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
import toml
from lora_samples import load_tool, mixed_adapter

from lcp_plugin.delivery.chain_tree import Search, failed, find_by_hash, trace
from lcp_plugin.delivery.retraining import retraining_config
from lcp_plugin.errors import LineageError
from lcp_plugin.formats.disk import write_json
from lcp_plugin.formats.foreign_header import read_claims
from lcp_plugin.formats.header import ModelSpec, kohya_header, tag_frequency
from lcp_plugin.formats.lineage import Lineage, ParentFile, collect_blocks
from lcp_plugin.formats.lora_file import lora_tensors, write_lora
from lcp_plugin.formats.tensors import read_header, write_tensors
from lcp_plugin.tasks import TaskRecord

TASKS = (
    TaskRecord(1, "boot", "object", "zwz boot", ("a {}",), "a photo of zwz boot", {"images": 5}),
    TaskRecord(2, "water", "style", 'wa"ter\ncolor', facts={"images": 3, "steps": 850}),
)
LINEAGE = Lineage(
    tasks=TASKS,
    strategy="merge_init",
    strategy_args=("init=unit",),
    base="sdxl-base-1.0",
    base_hash="ab" * 32,
    carry="delta",
    carry_hash="cd" * 32,
    blocks={"*": (64, 64), "unet.conv_in": (64,)},
    parents=(ParentFile("first", "ef" * 32),),
    seeds={"seed": 5, "order_seed": None},
    versions={"lcp_plugin": "1.0"},
    options={"network_dim": 64, "learning_rate": 1e-05, "optimizer_args": ["betas=.9,.999"]},
)
KOHYA = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "32",
    "ss_network_alpha": "16.0",
    "ss_learning_rate": "0.0001",
    "ss_unet_lr": "None",
    "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)",
    "ss_gradient_checkpointing": "True",
    "ss_sd_model_name": "juggernaut.safetensors",
    "ss_output_name": "my dog",
    "ss_dataset_dirs": json.dumps({"10_sks dog": {"n_repeats": 10, "img_count": 12}}),
    "ss_tag_frequency": json.dumps({"10_sks dog": {"sks dog": 12, "grass": 3}}),
}


def test_a_lineage_survives_its_header() -> None:
    metadata = LINEAGE.to_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert Lineage.from_metadata(metadata) == LINEAGE
    assert Lineage.from_metadata({"ss_network_dim": "4"}) is None


def test_what_is_empty_is_not_written() -> None:
    assert Lineage().to_metadata() == {"ss_lcp_format": "1"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ss_lcp_format", "99"),
        ("ss_lcp_tasks", "{"),
        ("ss_lcp_tasks", '{"a": 1}'),
        ("ss_lcp_tasks", '[{"name": "x"}]'),
        ("ss_lcp_blocks", '{"a": ["x"]}'),
        ("ss_lcp_parents", "[1]"),
        ("ss_lcp_seeds", "[" * 50_000),
    ],
)
def test_a_damaged_lineage_is_one_line(key: str, value: str) -> None:
    with pytest.raises(LineageError) as caught:
        Lineage.from_metadata({**LINEAGE.to_metadata(), key: value})
    assert "\n" not in str(caught.value)


def test_blocks_of_a_module_are_its_own_or_the_common_ones() -> None:
    blocks = collect_blocks({"a": [4, 4], "b": [4, 4], "c": [4]})
    assert blocks == {"*": (4, 4), "c": (4,)}
    lineage = Lineage(blocks=blocks)
    assert lineage.blocks_of("a") == (4, 4)
    assert lineage.blocks_of("c") == (4,)
    assert Lineage().blocks_of("a") == ()


def test_triggers_are_the_tasks_concepts_once_each() -> None:
    assert Lineage(tasks=(*TASKS, TASKS[0])).triggers == ("zwz boot", 'wa"ter\ncolor')


def test_kohyas_header_is_text_with_none_and_true_spelled_out() -> None:
    options = {"network_dim": 8, "network_alpha": 4.0, "gradient_checkpointing": True}
    facts = {"steps": 100, "tag_frequency": tag_frequency(TASKS)}
    header = kohya_header(options, {**facts, "sd_model_name": "base"})
    assert header["ss_network_dim"] == "8"
    assert header["ss_gradient_checkpointing"] == "True"
    assert header["ss_min_snr_gamma"] == "None"
    assert header["ss_sd_model_name"] == "base"
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert json.loads(header["ss_tag_frequency"])["1_zwz boot"] == {"zwz boot": 5}
    assert json.loads(header["ss_network_args"]) == {}
    minimum = {"v2", "base_model_version", "network_module", "network_dim", "network_alpha"}
    assert {f"ss_{name}" for name in minimum} <= set(header)


def test_the_model_spec_names_an_sdxl_lora_and_its_trigger_words() -> None:
    when = datetime(2026, 1, 2, 3, 4, 5, 6)
    header = ModelSpec("t", 512, "v_prediction", when, ("a", "b"), ("x", "y"), "1.0").to_metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.date"] == "2026-01-02T03:04:05"
    assert header["modelspec.resolution"] == "512x512"
    assert header["modelspec.prediction_type"] == "v"
    assert header["modelspec.trigger_phrase"] == "a, b"
    assert header["modelspec.merged_from"] == "x, y"


def test_a_kohya_header_is_summarised() -> None:
    summary = read_claims(KOHYA)
    assert summary.tool == "kohya sd-scripts"
    assert summary.base == "juggernaut.safetensors"
    assert summary.triggers == ("sks dog",)
    assert summary.datasets == {"10_sks dog": "12 images x 10"}
    assert summary.options["network_alpha"] == 16.0
    assert summary.options["optimizer_type"] == "bitsandbytes.optim.adamw.AdamW8bit"
    assert summary.options["gradient_checkpointing"] is True
    assert "unet_lr" not in summary.options


def test_onetrainer_and_ai_toolkit_headers_are_summarised() -> None:
    config = {"lora_rank": 16, "lora_alpha": 1.0, "optimizer": {"optimizer": "PRODIGY"}}
    one = read_claims({"ot_revision": "1", "ot_config": json.dumps(config)})
    assert one.tool == "OneTrainer"
    assert one.options["network_dim"] == 16
    assert one.options["optimizer_type"] == "PRODIGY"
    other = read_claims({"software": json.dumps({"name": "ai-toolkit"}), "name": "cat"})
    assert (other.tool, other.title) == ("ai-toolkit", "cat")


@pytest.mark.parametrize("text", ["[", "[1]", "{}", '{"a": 1}', '{"a": {"b": "c"}}', "null"])
def test_no_header_makes_the_summary_fail(text: str) -> None:
    keys = ("ss_tag_frequency", "ss_dataset_dirs", "ss_network_args", "ot_config", "software")
    keys = (*keys, "ss_lcp_format", "ss_lcp_tasks")
    found = read_claims({**KOHYA, **dict.fromkeys(keys, text)})
    assert (found.tool, found.base) == ("lcp_plugin", "juggernaut.safetensors")
    assert found.options["network_alpha"] == 16.0  # what is whole is still read
    assert "sks dog" not in found.triggers  # what is damaged is left out


# --------------------------------------------------------------------------------- trees of files


def test_a_chain_is_traced_and_verified_by_hash(tmp_path: Path) -> None:
    parent = write_lora(tmp_path / "old" / "first.safetensors", mixed_adapter(), KOHYA)
    child = Lineage(
        tasks=TASKS, base_hash="ab", parents=(ParentFile("first", parent["sshs_model_hash"]),)
    )
    other = mixed_adapter().map_down(lambda _, a: a * 2)
    write_lora(tmp_path / "second.safetensors", other, child.to_metadata())
    tree = trace(tmp_path / "second.safetensors", Search((tmp_path / "old",), base_hash="ab"))
    states = {check.what: check.state for check in tree.checks}
    assert states == {"tensors": "verified", "base": "verified"}
    text = "\n".join(tree.render())
    assert "zwz boot" in text
    assert "first.safetensors" in text
    assert not failed(tree.all_checks())


def test_a_parent_that_is_not_there_and_another_base_are_said(tmp_path: Path) -> None:
    child = Lineage(base_hash="ab", parents=(ParentFile("gone", "12" * 32),))
    write_lora(tmp_path / "a.safetensors", mixed_adapter(), child.to_metadata())
    tree = trace(tmp_path / "a.safetensors", Search(base_hash="cd"))
    assert [c.what for c in failed(tree.all_checks())] == ["base"]
    assert [c.state for c in tree.all_checks() if c.what == "parent"] == ["not found"]


def test_tensors_that_were_changed_after_saving_are_found_out(tmp_path: Path) -> None:
    header = write_lora(tmp_path / "a.safetensors", mixed_adapter())
    other = mixed_adapter().map_down(lambda _, a: a * 2)
    write_tensors(tmp_path / "a.safetensors", lora_tensors(other), header)
    tree = trace(tmp_path / "a.safetensors")
    assert [c.what for c in failed(tree.all_checks())] == ["tensors"]


def test_a_loop_of_parents_ends(tmp_path: Path) -> None:
    header = write_lora(tmp_path / "a.safetensors", mixed_adapter())
    own = ParentFile("itself", header["sshs_model_hash"])
    write_lora(tmp_path / "a.safetensors", mixed_adapter(), Lineage(parents=(own,)).to_metadata())
    assert "already shown" in "\n".join(trace(tmp_path / "a.safetensors").render())


def test_a_task_folder_is_verified_part_by_part(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "01_boot"
    hashed = write_lora(folder / "adapter.safetensors", mixed_adapter())["sshs_model_hash"]
    write_tensors(folder / "carry.safetensors", lora_tensors(mixed_adapter()))
    facts = {"format": 1, "task": TASKS[0].to_json(), "tasks": [TASKS[0].to_json()]}
    facts |= {"strategy": {"name": "naive", "args": []}, "base": {"name": "toy", "hash": "ab"}}
    hashes = {"adapter": hashed, "carry": "00" * 32, "strategy": "11" * 32}
    write_json(folder / "lineage.json", {**facts, "hashes": hashes})
    for path in (folder, tmp_path / "run"):
        states = {c.what: c.state for c in trace(path).all_checks()}
        assert states == {"adapter": "verified", "carry": "differs", "strategy": "not kept"}


def test_a_file_without_a_hash_is_found_by_its_tensors(tmp_path: Path) -> None:
    hashed = write_lora(tmp_path / "a.safetensors", mixed_adapter())["sshs_model_hash"]
    write_tensors(tmp_path / "a.safetensors", lora_tensors(mixed_adapter()))
    assert find_by_hash(hashed, [tmp_path]) == tmp_path / "a.safetensors"
    assert find_by_hash("00" * 32, [tmp_path]) is None


# ------------------------------------------------------------------------------ training again


def test_our_file_gives_the_toml_of_its_tasks(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", mixed_adapter(), LINEAGE.to_metadata())
    config = toml.loads(retraining_config(tmp_path / "a.safetensors"))
    assert config["strategy"] == "merge_init"
    assert config["strategy_args"] == ["init=unit"]
    assert config["learning_rate"] == 1e-05
    assert config["seed"] == 5
    assert "order_seed" not in config
    assert [t["concept"] for t in config["tasks"]] == ["zwz boot", 'wa"ter\ncolor']
    assert config["tasks"][0]["eval_prompts"] == ["a {}"]


def test_a_kohya_file_gives_the_toml_of_its_folders(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", mixed_adapter(), KOHYA)
    config = toml.loads(retraining_config(tmp_path / "a.safetensors"))
    assert config["network_dim"] == 32
    assert config["tasks"][0]["name"] == "sks_dog"
    assert config["tasks"][0]["concept"] == "sks dog"


def test_a_header_that_says_nothing_is_refused(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", mixed_adapter())
    with pytest.raises(LineageError, match="says nothing"):
        retraining_config(tmp_path / "a.safetensors")


def test_the_tool_prints_trees_and_toml_and_fails_on_a_wrong_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = load_tool("lineage")
    path = tmp_path / "a.safetensors"
    write_lora(path, mixed_adapter(), {**KOHYA, **LINEAGE.to_metadata()})
    assert tool.main([str(path)]) == 0
    assert "trigger words: zwz boot" in capsys.readouterr().out
    assert tool.main([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == str(path)
    assert tool.main([str(path), "--toml"]) == 0
    assert "[[tasks]]" in capsys.readouterr().out
    wrong = {**read_header(path).metadata, "sshs_model_hash": "00" * 32}
    write_tensors(path, lora_tensors(mixed_adapter()), wrong)
    assert tool.main([str(path)]) == 1
    assert tool.main([str(tmp_path / "missing")]) == 1
    assert "error: " in capsys.readouterr().err


def test_unset_values_and_lists_of_a_header_are_read_as_what_they_were() -> None:
    header = {
        "ss_network_dim": "16",
        "ss_resolution": "None",
        "ss_text_encoder_lr": "()",
        "ss_unet_lr": "0.0001",
    }
    options = read_claims(header).options
    assert options == {"network_dim": 16, "unet_lr": 0.0001}
    options = read_claims({**header, "ss_text_encoder_lr": "(1e-05, 2e-05)"}).options
    assert options["text_encoder_lr"] == [1e-05, 2e-05]
