"""`lcp init`: what it writes runs, says what it guessed, and overwrites nothing."""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_base.world import describe_scene, sample_scene
from toy_runs import draw_pictures

from lcp_plugin.cli import main as train
from lcp_plugin.commands.init import main as init
from lcp_plugin.doctor import machine
from lcp_plugin.initial.words import ENDINGS, IN_USE, RARE, choose_words, count_tokens, list_words
from lcp_plugin.sdxl.load import find_tokenizer

DREAMBOOTH = Path(__file__).parents[3] / "shared" / "data" / "dreambooth" / "dataset"
HUB = "stabilityai/stable-diffusion-xl-base-1.0"

Init = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that commands are given in, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "free_vram_gb", lambda: None)
    return tmp_path


@pytest.fixture
def started() -> Init:
    """Runs `lcp init photos ...`; the configuration as read back."""

    def start(*flags: str) -> dict[str, Any]:
        assert init(["photos", *flags]) == 0
        return tomllib.loads(Path("photos.toml").read_text(encoding="utf-8"))

    return start


def write_captions(folder: Path, texts: Sequence[str], ending: str = ".txt") -> None:
    """A caption beside each of the first images."""
    for image, text in zip(sorted(folder.glob("*.png")), texts, strict=False):
        image.with_suffix(ending).write_text(text, encoding="utf-8")


def by_name(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {task["name"]: task for task in config["tasks"]}


# ---------------------------------------------------------------------------------- that it runs


def test_folders_become_tasks_that_a_dry_run_takes(
    here: Path, started: Init, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_pictures(here / "photos" / "Fancy_Boot2", count=6)
    draw_pictures(here / "photos" / "Ink sketches")
    draw_pictures(here / "photos" / "zebra")
    config = started()
    told = capsys.readouterr().out
    assert config["pretrained_model_name_or_path"] == "tiny-sdxl"
    assert "no GPU here" in told
    tasks = by_name(config)
    assert list(tasks) == ["Fancy_Boot2", "Ink_sketches", "zebra"]
    assert tasks["Fancy_Boot2"]["concept"].endswith(" fancy boot")
    assert tasks["Fancy_Boot2"]["max_train_steps"] == 200  # 6 x 130 / 4, to tens
    assert [task["kind"] for task in tasks.values()] == ["object", "style", "object"]
    assert "style, guessed: the folder's name says 'sketches': Ink_sketches" in told
    assert train(["--config", "photos.toml", "--dry_run"]) == 0
    plan = capsys.readouterr().out
    steps = sum(task["max_train_steps"] for task in tasks.values())
    assert f"{steps} steps in all" in told
    assert f"{steps} steps in all" in plan
    assert "lcp train --config photos.toml" in told


def test_every_task_has_a_word_of_its_own_that_the_base_keeps_as_one_token(
    here: Path, started: Init
) -> None:
    for number in range(12):
        draw_pictures(here / "photos" / f"toy {'abcdefghijkl'[number]}", count=1)
    words = [task["concept"].split()[0] for task in started()["tasks"]]
    tokenizer = find_tokenizer("tiny-sdxl")
    assert len(set(words)) == 12
    assert all(count_tokens(tokenizer, word) == 1 for word in words)
    assert all(len(word) >= 3 for word in words)


def test_the_known_rare_words_are_short_plain_and_not_the_ones_that_everybody_uses() -> None:
    assert len({*RARE, *ENDINGS}) == len(RARE) + len(ENDINGS)
    assert all(re.fullmatch(r"[a-z]{3,4}", word) for word in RARE)
    assert all(re.fullmatch(r"[a-z]{3,5}", word) for word in ENDINGS)
    assert not {*RARE, *ENDINGS} & IN_USE


def test_no_rare_word_has_two_letters_or_stands_in_a_caption_of_the_base() -> None:
    tokenizer = find_tokenizer("tiny-sdxl")
    words = list(list_words(tokenizer))
    assert len(words) >= 40
    assert all(len(word) >= 3 for word in words)
    generator, read = np.random.default_rng(0), set()
    for _ in range(400):
        caption = describe_scene(sample_scene(generator, held_out=False), generator)
        read |= set(tokenizer(caption, add_special_tokens=False).input_ids)
    assert not read & {tokenizer.get_vocab()[f"{word}</w>"] for word in words}


def test_a_word_whose_token_another_task_speaks_is_not_chosen() -> None:
    tokenizer = find_tokenizer("tiny-sdxl")
    assert tokenizer.tokenize("lovely") == ["lo", "vely</w>"]
    assert choose_words(1, tokenizer, ["dog"]) == ["vely"]
    assert choose_words(1, tokenizer, ["lovely"]) == ["ssed"]


def test_more_folders_than_rare_words_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_pictures(here / "first", count=1)
    many = len(list(list_words(find_tokenizer("tiny-sdxl")))) + 1
    for number in range(many):
        shutil.copytree(here / "first", here / "photos" / f"toy{number:02d}x")
    assert init(["photos"]) == 2
    assert f"{many} tasks to name, and only " in capsys.readouterr().err
    assert not (here / "photos.toml").exists()


@pytest.mark.skipif(not DREAMBOOTH.is_dir(), reason="the DreamBooth photos are not here")
def test_the_ten_dreambooth_subjects_are_ten_objects(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init([str(DREAMBOOTH), "--output", "ten.toml"]) == 0
    config = tomllib.loads((here / "ten.toml").read_text(encoding="utf-8"))
    assert {task["kind"] for task in config["tasks"]} == {"object"}
    assert len({task["concept"].split()[0] for task in config["tasks"]}) == 10
    assert "prompts_and_classes.txt" in capsys.readouterr().out
    assert train(["--config", "ten.toml", "--dry_run"]) == 0


# ------------------------------------------------------------------------------ what is refused


def test_nothing_is_overwritten(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_pictures(here / "photos" / "dog", count=1)
    (here / "photos.toml").write_text("mine", encoding="utf-8")
    assert init(["photos"]) == 2
    assert "give another name by --output" in capsys.readouterr().err
    assert (here / "photos.toml").read_text(encoding="utf-8") == "mine"
    assert init(["photos", "--output", "other.toml"]) == 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["empty"], "holds no images in its folders"),
        (["mine"], "lcp init PHOTOS --prev mine"),
        (["photos", "--kind", "dog=styel"], "wanted object, style, or FOLDER=object|style"),
        (["photos", "--kind", "cat=style"], "no folder of that name"),
        (["photos", "--base", "gone.safetensors"], "'gone.safetensors' does not exist"),
        (["photos", "--preset", "8gb"], "tiny-sdxl needs none"),
        (["photos", "--base", HUB, "--preset", "9gb"], "wanted one of 8gb, 12gb, 24gb"),
        (["photos", "--strategy", "recal"], "recall"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    draw_pictures(here / "photos" / "dog", count=1)
    (here / "empty" / "inner").mkdir(parents=True)
    draw_pictures(here / "mine" / "samples", count=1)
    (here / "mine" / "run.json").write_text("{}", encoding="utf-8")
    assert init(flags) != 0
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
    assert not list(here.glob("*.toml"))


def test_an_unreadable_photo_is_named_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = draw_pictures(here / "photos" / "dog", count=1) / "bad.jpg"
    bad.write_bytes(b"no picture")
    assert init(["photos"]) == 1
    assert "bad.jpg" in capsys.readouterr().err
    assert not list(here.glob("*.toml"))


# ---------------------------------------------------------------------------- what folders hold


def test_kohyas_folders_keep_their_repeats_and_words(
    here: Path, started: Init, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_pictures(here / "photos" / "img" / "20_sks dog")
    draw_pictures(here / "photos" / "img" / "10_robot")
    (here / "photos" / "log").mkdir()
    config = started()
    tasks = by_name(config)
    assert tasks["sks_dog"]["concept"] == "sks dog"
    subset = tasks["sks_dog"]["datasets"][0]["subsets"][0]
    assert subset["num_repeats"] == 20
    assert subset["class_tokens"] == "sks dog"
    word = tasks["robot"]["concept"].split()[0]
    assert tasks["robot"]["datasets"][0]["subsets"][0]["class_tokens"] == f"{word} robot"
    assert "log: left out" in capsys.readouterr().out
    assert train(["--config", "photos.toml", "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert "3, 60 with repeats" in plan
    assert "captions: 'sks dog'" in plan


def test_a_folder_that_counts_twice_is_trained_twice_as_long(here: Path, started: Init) -> None:
    draw_pictures(here / "photos" / "10_once", count=4)
    draw_pictures(here / "photos" / "20_twice", count=4)
    tasks = by_name(started("--base", HUB, "--preset", "24gb"))
    assert tasks["once"]["max_train_steps"] == 500  # 4 x 100, and never below
    assert tasks["twice"]["max_train_steps"] == 800


def test_hidden_files_and_files_that_are_no_images_are_told(
    here: Path, started: Init, capsys: pytest.CaptureFixture[str]
) -> None:
    dog = draw_pictures(here / "photos" / "dog")
    (dog / ".DS_Store").write_bytes(b"")
    (dog / "notes.docx").write_bytes(b"")
    (dog / "raw.cr2").write_bytes(b"")
    (here / "photos" / "later").mkdir()
    draw_pictures(here / "photos", count=2)
    started()
    told = capsys.readouterr().out
    assert "dog: 1 hidden file left out (.DS_Store)" in told
    assert "dog: 1 file that is no image left out (notes.docx)" in told
    assert "raw.cr2" in told
    assert "later: left out; holds no images" in told
    assert "2 images left out, which lie directly in photos" in told
    assert "# dog: 1 hidden file left out" in Path("photos.toml").read_text(encoding="utf-8")


def test_a_folder_of_photos_alone_is_one_task(here: Path, started: Init) -> None:
    draw_pictures(here / "photos")
    assert list(by_name(started())) == ["photos"]


def test_names_are_fit_for_any_system_and_differ(here: Path, started: Init) -> None:
    for name in ("con", "мой кот", 'a "quoted" dog', "toy", "toy 2", "Toy_3"):
        draw_pictures(here / "photos" / name, count=1)
    names = list(by_name(started()))
    assert len({name.lower() for name in names}) == 6
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names)
    assert train(["--config", "photos.toml", "--dry_run"]) == 0


def test_captions_without_the_word_get_it_and_those_with_one_keep_theirs(
    here: Path, started: Init, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = draw_pictures(here / "photos" / "dog")
    write_captions(bare, ["a dog on grass", "a dog, sleeping"])
    own = draw_pictures(here / "photos" / "my cat")
    write_captions(own, ["photo of xqz cat in snow", "photo of xqz cat", "photo of xqz cat, old"])
    tasks = by_name(started())
    assert tasks["dog"]["caption_extension"] == ".txt"
    assert tasks["dog"]["caption_prefix"] == f"{tasks['dog']['concept']},"
    assert tasks["my_cat"]["concept"] == "xqz cat"
    assert "caption_prefix" not in tasks["my_cat"]
    text = Path("photos.toml").read_text(encoding="utf-8")
    assert "2 of 3 images have a caption" in text
    assert "'xqz' is 3 tokens for this base" in text
    assert train(["--config", "photos.toml", "--dry_run"]) == 0
    assert f"{tasks['dog']['concept']}, a dog on grass" in capsys.readouterr().out


# ------------------------------------------------------------------------------ what is guessed


def test_kinds_are_guessed_from_names_motifs_captions_and_files(here: Path, started: Init) -> None:
    photos = here / "photos"
    draw_pictures(photos / "cubism")
    for motif in ("cat", "tree"):
        draw_pictures(photos / "motifs" / motif, count=2)
    write_captions(draw_pictures(photos / "told"), ["a painting of a cat", "a sketch of a tree"])
    for number, name in enumerate(("cat", "house", "tree", "boat")):
        target = photos / "files" / f"{name}_{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "teal").save(target)
    for number in range(4):
        Image.new("RGB", (64, 64), "gold").save(photos / "files" / f"IMG_{number}.png")
        target = photos / "same" / f"rex_{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "teal").save(target)
    kinds = {name: task["kind"] for name, task in by_name(started()).items()}
    expected = dict.fromkeys(("cubism", "files", "motifs", "told"), "style") | {"same": "object"}
    assert kinds == expected
    assert train(["--config", "photos.toml", "--dry_run"]) == 0


def test_what_the_user_says_of_a_kind_holds(here: Path, started: Init) -> None:
    for motif in ("front", "back"):
        draw_pictures(here / "photos" / "robot" / motif, count=2)
    draw_pictures(here / "photos" / "vase")
    tasks = by_name(started("--kind", "style", "robot=object"))
    assert tasks["robot"]["kind"] == "object"
    assert tasks["robot"]["image_dir"] == ["photos/robot/back", "photos/robot/front"]
    assert tasks["vase"]["kind"] == "style"
    assert train(["--config", "photos.toml", "--dry_run"]) == 0


# -------------------------------------------------------------------- what the machine decides


@pytest.mark.parametrize(("free", "preset"), [(30.0, "24gb"), (11.6, "12gb"), (4.0, "8gb")])
def test_a_gpu_gets_sdxl_and_the_preset_that_fits(
    here: Path, started: Init, monkeypatch: pytest.MonkeyPatch, free: float, preset: str
) -> None:
    monkeypatch.setattr(machine, "free_vram_gb", lambda: free)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    for number in range(7):
        image = Image.new("RGB", (900, 700), "teal")
        target = here / "photos" / "dog" / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
    config = started()
    assert config["pretrained_model_name_or_path"] == HUB
    assert config["preset"] == preset
    assert config["resolution"] == "768,768"  # sqrt(900 x 700) is 794
    assert config["enable_bucket"] is True
    assert config["tasks"][0]["max_train_steps"] == 700
    assert config["tasks"][0]["concept"] == f"{RARE[0]} dog"


def test_photos_as_large_as_the_base_keep_its_own_size(here: Path, started: Init) -> None:
    (here / "photos" / "dog").mkdir(parents=True)
    Image.new("RGB", (1200, 1180), "teal").save(here / "photos" / "dog" / "a.png")
    config = started("--base", HUB, "--preset", "12gb")
    assert "resolution" not in config
    assert "enable_bucket" not in config


def test_the_next_command_can_be_pasted_where_a_name_has_spaces(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_pictures(here / "my photos" / "dog", count=1)
    assert init(["my photos", "--output", "my run.toml"]) == 0
    told = capsys.readouterr().out
    line = next(line for line in told.splitlines() if line.startswith("next "))
    command = shlex.split(line.removeprefix("next"))
    assert command == ["lcp", "train", "--config", "my run.toml"]
    assert train([*command[2:], "--dry_run"]) == 0
    first = Path("my run.toml").read_text("utf-8").splitlines()[0]
    assert shlex.split(first.removeprefix("# ")) == command
