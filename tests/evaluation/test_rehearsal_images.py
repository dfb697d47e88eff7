"""`lcp rehearse`: what a LoRA knows as regularisation images, for any trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toml
from lora_samples import load_tool
from safetensors.torch import load_file, save_file
from told import assert_one_error
from toy_runs import BASICS, draw_pictures

from lcp_plugin.config.load import load_config
from lcp_plugin.formats.pictures import list_images
from lcp_plugin.run.runner import execute
from lcp_plugin.tasks import EVAL_PROMPTS

QUICK = ("--images", "2", "--steps", "2", "--device", "cpu")


@pytest.fixture
def draw(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """draw(source, output, *flags) -> the tool's exit status, and what it said."""
    tool = load_tool("rehearsal_images")

    def run_tool(source: Path, output: Path, *flags: str) -> tuple[int, str]:
        status = tool.main([str(source), "--output", str(output), *QUICK, *flags])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run_tool


def captions(folder: Path) -> dict[str, str]:
    return {p.stem: p.read_text(encoding="utf-8").strip() for p in sorted(folder.glob("*.txt"))}


def pixels(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.png")}


def test_a_run_s_concepts_are_drawn_with_captions_for_three_trainers(
    run: Path, tmp_path: Path, draw: Callable[..., tuple[int, str]]
) -> None:
    status, said = draw(run, tmp_path / "set")
    assert status == 0
    assert "4 images of sks0 disc, sks1 disc" in said
    assert all(name in said for name in ("sd-scripts", "OneTrainer", "ai-toolkit"))
    for concept in ("sks0 disc", "sks1 disc"):
        folder = tmp_path / "set" / f"1_{concept}"
        texts = captions(folder)
        assert [p.stem for p in list_images(folder)] == list(texts) == ["000", "001"]
        assert texts["000"] == f"a photo of {concept}"
        assert concept in texts["001"]
        assert not set(texts.values()) & {p.format(concept=concept) for p in EVAL_PROMPTS["object"]}


def test_the_snippet_is_a_dataset_that_our_own_trainer_learns_from(
    run: Path, toy_base: Path, tmp_path: Path, draw: Callable[..., tuple[int, str]]
) -> None:
    assert draw(run, tmp_path / "set")[0] == 0
    file = tmp_path / "set" / "dataset_config.toml"
    (dataset,) = toml.load(file)["datasets"]
    assert all(subset["is_reg"] for subset in dataset["subsets"])
    own = draw_pictures(tmp_path / "own", count=2, colour="gold")
    added = f'\n[[datasets.subsets]]\nimage_dir = "{own.as_posix()}"\nclass_tokens = "zwz disc"\n'
    file.write_text(file.read_text(encoding="utf-8") + added, encoding="utf-8")
    task = {"name": "new", "kind": "object", "concept": "zwz disc", "dataset_config": str(file)}
    options = {**BASICS, "max_train_steps": 1, "pretrained_model_name_or_path": str(toy_base)}
    more = {"output_dir": str(tmp_path / "out"), "output_name": "new", "tasks": [task]}
    config = tmp_path / "new.toml"
    config.write_text(toml.dumps({**options, **more}), encoding="utf-8")
    read = load_config(["--config", str(config)])
    subsets = read.tasks[0].datasets[0].subsets
    assert [subset.is_reg for subset in subsets] == [True, True, False]
    assert [subset.caption_extension for subset in subsets][:2] == [".txt", ".txt"]
    assert execute(read).store.folders()


def test_a_set_that_was_interrupted_is_finished_and_ends_the_same(
    run: Path, tmp_path: Path, draw: Callable[..., tuple[int, str]]
) -> None:
    folder = tmp_path / "set"
    assert "(4 drawn now)" in draw(run, folder)[1]
    whole = pixels(folder)
    (folder / "1_sks0 disc" / "001.png").unlink()
    (folder / "dataset_config.toml").unlink()
    assert "(1 drawn now)" in draw(run, folder)[1]
    assert pixels(folder) == whole
    assert (folder / "dataset_config.toml").is_file()


def test_pictures_of_another_set_are_neither_mixed_in_nor_overwritten(
    run: Path, tmp_path: Path, draw: Callable[..., tuple[int, str]]
) -> None:
    folder = tmp_path / "set"
    assert draw(run, folder)[0] == 0
    whole = pixels(folder)
    status, said = draw(run, folder, "--seed", "7")
    assert status != 0
    assert "was drawn otherwise" in said
    assert pixels(folder) == whole
    draw_pictures(folder / "strange", count=1)
    (folder / "strange" / "00.png").rename(folder / "1_sks1 disc" / "photo.png")
    assert "photo.png was drawn otherwise" in draw(run, folder)[1]


def test_a_deliverable_draws_what_its_run_does(
    run: Path, tmp_path: Path, draw: Callable[..., tuple[int, str]], trained_once: Path
) -> None:
    assert draw(run, tmp_path / "of_run")[0] == 0
    file = trained_once.with_suffix(".safetensors")
    assert file.is_file()
    assert draw(file, tmp_path / "of_file", "--base", str(base_of(run)))[0] == 0
    for concept in ("sks0 disc", "sks1 disc"):
        ours, theirs = (tmp_path / d / f"1_{concept}" for d in ("of_run", "of_file"))
        assert captions(ours) == captions(theirs)


def base_of(run: Path) -> str:
    from lcp_plugin.formats.disk import read_json

    return str(read_json(next(run.glob("01_*")) / "lineage.json")["base"]["name"])


@pytest.fixture
def foreign(trained_once: Path, tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """foreign(metadata) -> a LoRA with our tensors and nothing of our header."""
    tensors = load_file(trained_once.with_suffix(".safetensors"))

    def write(metadata: dict[str, str]) -> Path:
        path = tmp_path / "anyones.safetensors"
        save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)
        return path

    return write


def test_anyone_s_lora_is_drawn_by_its_prompts_or_its_header(
    foreign: Callable[..., Path], toy_base: Path, tmp_path: Path, draw: Callable[..., Any]
) -> None:
    base = ("--base", str(toy_base))
    file = foreign({})
    assert draw(file, tmp_path / "a", *base, "--prompts", "a photo of sks dog")[0] == 0
    told = captions(tmp_path / "a" / "1_sks dog")
    assert told["000"] == "a photo of sks dog"
    assert "sks dog" in told["001"]
    assert told["001"] != told["000"]  # the concept elsewhere
    file = foreign({"modelspec.trigger_phrase": "ink wash"})
    assert draw(file, tmp_path / "b", *base)[0] == 0
    assert set(captions(tmp_path / "b" / "1_anyones").values()) == {"ink wash"}


@pytest.mark.parametrize(
    ("metadata", "flags", "line"),
    [
        ({}, ("--base", "BASE"), "does not say what it was trained on"),
        ({"modelspec.trigger_phrase": "ink"}, (), "does not say on which base"),
        ({"modelspec.trigger_phrase": "ink"}, ("--settings", "2"), "a share from 0 to 1"),
    ],
)
def test_what_a_lora_lacks_is_one_line(
    foreign: Callable[..., Path],
    toy_base: Path,
    tmp_path: Path,
    draw: Callable[..., tuple[int, str]],
    metadata: dict[str, str],
    flags: tuple[str, ...],
    line: str,
) -> None:
    given = [str(toy_base) if flag == "BASE" else flag for flag in flags]
    status, said = draw(foreign(metadata), tmp_path / "set", *given)
    assert status != 0
    assert line in said
    assert_one_error(said)
    assert not list((tmp_path / "set").rglob("*.png"))


def test_bad_sources_are_one_line(
    run: Path, tmp_path: Path, draw: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors", encoding="utf-8")
    for source in (tmp_path / "none", tmp_path / "empty", tmp_path / "text.safetensors"):
        status, said = draw(source, tmp_path / "set")
        assert status != 0
        assert_one_error(said)
        assert "--prev" not in said
    assert "leave them out" in draw(run, tmp_path / "set", "--prompts", "a dog")[1]
    assert not (tmp_path / "set" / "dataset_config.toml").exists()
