"""`lcp init PHOTOS --prev CHAIN`: the configuration goes on from what was learned before."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_samples import Q, factors
from safetensors.torch import save_file
from toy_runs import draw_pictures

from lcp_plugin.adapter import Adapter
from lcp_plugin.cli import main as train
from lcp_plugin.commands.init import main as init
from lcp_plugin.doctor import machine
from lcp_plugin.formats.lora_file import portable_adapter
from lcp_plugin.initial.recipe import free_name

FACTS = {"images": 3, "rank": 8, "alpha": 4.0}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photos of a dog, in which commands are given, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "free_vram_gb", lambda: None)
    draw_pictures(tmp_path / "photos" / "dog", count=2)
    return tmp_path


def write_chain(root: Path, *names: str, words: str = "vely ssed", **more: Any) -> Path:
    """A run on tiny-sdxl that has learned tasks of these names, without its tensors."""
    tasks = [
        {"index": i, "name": name, "concept": f"{word} {name}", "facts": FACTS}
        for i, (name, word) in enumerate(zip(names, words.split(), strict=False), 1)
    ]
    for i, task in enumerate(tasks, 1):
        folder = root / f"{i:02d}_{task['name']}"
        folder.mkdir(parents=True)
        lineage = {
            "format": 1,
            "task": task,
            "tasks": tasks[:i],
            "hashes": {"carry": "0"},
            "strategy": {"name": "recall", "args": ["of=merge_init"]},
            "base": {"name": "tiny-sdxl", "hash": "", "origin": ""},
            "options": {"network_args": ["conv_dim=8", "conv_alpha=4"]},
        }
        (folder / "lineage.json").write_text(json.dumps(lineage), encoding="utf-8")
    images = {name: [str(Path("photos", name).absolute())] for name in names}
    (root / "run.json").write_text(json.dumps({"images": images, **more}), encoding="utf-8")
    return root


@pytest.fixture
def go_on() -> Callable[..., dict[str, Any]]:
    """Runs `lcp init photos --prev ...`; the configuration as read back."""

    def start(*flags: str, file: str = "photos.toml") -> dict[str, Any]:
        assert init(["photos", "--prev", *flags]) == 0
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))

    return start


def test_base_strategy_and_form_are_the_chains(go_on: Callable[..., dict[str, Any]]) -> None:
    config = go_on(str(write_chain(Path("output/old"), "robot", "vase")))
    assert config["prev"] == "output/old"
    assert config["pretrained_model_name_or_path"] == "tiny-sdxl"
    assert (config["strategy"], config["strategy_args"]) == ("recall", ["of=merge_init"])
    assert (config["network_dim"], config["network_alpha"]) == (8, 4)
    assert config["network_args"] == ["conv_dim=8", "conv_alpha=4"]
    assert "allow_strategy_change" not in config


def test_names_and_words_of_the_chain_are_not_given_again(
    go_on: Callable[..., dict[str, Any]], here: Path
) -> None:
    write_chain(Path("output/old"), "dog", "vase")
    (here / "output" / "old" / "run.json").unlink()  # so that it cannot say which photos it saw
    draw_pictures(here / "photos" / "vely cat", count=1)
    config = go_on("output/old")
    assert [task["name"] for task in config["tasks"]] == ["dog_2", "vely_cat"]
    assert config["tasks"][0]["concept"] == "pped dog"
    text = Path("photos.toml").read_text(encoding="utf-8")
    assert "'vely' is in 'vely dog' too: give one of them another word" in text


def test_folders_that_it_has_learned_are_left_out_along_the_whole_chain(
    go_on: Callable[..., dict[str, Any]], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "cow"):
        draw_pictures(here / "photos" / name, count=1)
    first = write_chain(Path("output/first"), "dog")
    parent = {"parent": {"source": str(first / "01_dog")}}
    second = write_chain(Path("output/second"), "dog", "cat", **parent)
    record = json.loads((second / "run.json").read_text(encoding="utf-8"))
    del record["images"]["dog"]  # that task was the first run's
    (second / "run.json").write_text(json.dumps(record), encoding="utf-8")
    config = go_on("output/second")
    assert [task["name"] for task in config["tasks"]] == ["cow"]
    assert "cat, dog: left out; learned by the chain already" in capsys.readouterr().out


def test_a_chain_that_has_learned_every_folder_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert init(["photos", "--prev", str(write_chain(Path("output/old"), "dog"))]) == 1
    assert "has learned every folder of photos (dog)" in capsys.readouterr().err
    assert not Path("photos.toml").exists()


def test_neither_the_chains_config_nor_its_run_is_in_the_way(
    go_on: Callable[..., dict[str, Any]], here: Path
) -> None:
    write_chain(Path("output/photos"), "vase")
    Path("photos.toml").write_text("of the first run", encoding="utf-8")
    assert go_on("output/photos", file="photos_2.toml")["output_name"] == "photos_2"
    assert init(["photos", "--prev", "output/photos", "--output", "photos.toml"]) == 2
    assert Path("photos.toml").read_text(encoding="utf-8") == "of the first run"


def test_a_name_is_free_with_the_first_number_that_makes_it_so() -> None:
    assert free_name("a", {"a", "a_2", "a_3"}.__contains__) == "a_4"
    assert free_name("a", set[str]().__contains__) == "a"


def test_another_strategy_is_written_as_a_change(go_on: Callable[..., dict[str, Any]]) -> None:
    config = go_on(str(write_chain(Path("output/old"), "vase")), "--strategy", "merge_init")
    assert (config["strategy"], config["allow_strategy_change"]) == ("merge_init", True)
    assert "strategy_args" not in config


def write_foreign(metadata: Mapping[str, str]) -> Path:
    """A LoRA of rank 3 and alpha 1.5, as another tool writes one."""
    adapter = portable_adapter(Adapter({Q: factors((96, 96), 3, 1.5, 0)}))
    tensors: dict[str, torch.Tensor] = {}
    for name, own in adapter.items():
        key = f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": own.down, f"{key}.lora_up.weight": own.up}
        tensors[f"{key}.alpha"] = torch.tensor(own.alpha)
    save_file(tensors, "anyones.safetensors", dict(metadata))
    return Path("anyones.safetensors")


def test_a_lora_of_another_tool_is_rehearsed_by_its_header(
    go_on: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_foreign({"modelspec.trigger_phrase": "ohwx robot"})
    config = go_on(str(file))
    assert config["strategy"] == "recall"
    assert config["prev_prompts"] == ["ohwx robot"]
    assert (config["network_dim"], config["network_alpha"]) == (3, 1.5)
    assert config["pretrained_model_name_or_path"].startswith("stabilityai/")
    assert "does not name its base" in capsys.readouterr().out
    assert config["tasks"][0]["concept"].split()[0] != "ohwx"


def test_a_header_that_says_nothing_leaves_a_line_to_fill_in(
    go_on: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config = go_on(str(write_foreign({})), "--base", "tiny-sdxl")
    assert config["prev_prompts"] == []
    assert "fill in prev_prompts" in capsys.readouterr().out
    command = ["--config", "photos.toml", "--dry_run"]
    assert train(command) == 2
    assert "name prompts that it was trained with" in capsys.readouterr().err
    assert train([*command, "--prev_prompts", "a photo of sks robot"]) == 0


def test_a_chain_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert init(["photos", "--prev", "nowhere"]) == 1
    assert "--prev nowhere does not exist" in capsys.readouterr().err
    assert init(["photos", "--prev", "photos"]) == 1
    assert "holds no complete task" in capsys.readouterr().err
