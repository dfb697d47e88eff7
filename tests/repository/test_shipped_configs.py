"""The configs that ship: they load, follow the paper's protocol, and start with their command."""

from __future__ import annotations

import random
import shlex
from pathlib import Path

import pytest
from PIL import Image

from lcp_plugin.config.load import RunConfig, load_config
from lcp_plugin.config.sources import find_config
from lcp_plugin.config.tables import read_table
from lcp_plugin.tasks import Task, shuffle_tasks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OBJECTS = [  # arXiv 2410.04891, in the file's order: concept, folder
    ("sks sneaker", "colorful_sneaker"),
    ("zwz boot", "fancy_boot"),
    ("sbu backpack", "backpack"),
    ("uwu stuffed animal", "bear_plushie"),
    ("pdw candle", "candle"),
    ("twt can", "can"),
    ("zsn glasses", "pink_sunglasses"),
    ("ofl bowl", "berry_bowl"),
    ("psq cartoon", "red_cartoon"),
    ("cws teapot", "teapot"),
]


def load_with_pictures(name: str, tmp_path: Path, *flags: str) -> RunConfig:
    """The config with a picture in every folder that its tasks name."""
    for task in read_table(CONFIGS / f"{name}.toml")["tasks"]:
        folder = tmp_path / task["image_dir"]
        inner = folder / "Dogs" if task["kind"] == "style" else folder
        inner.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(inner / "1.jpg")
    return load_config(["--config", name, "--data_root", str(tmp_path), *flags])


@pytest.mark.parametrize("name", ["objects", "styles"])
def test_the_protocol_is_the_papers(name: str, tmp_path: Path) -> None:
    run = load_with_pictures(name, tmp_path)
    options = run.options
    assert len(run.tasks) == 10
    assert (options.rank, options.alpha, options.lora_targets) == (64, 64.0, "attention")
    assert (options.optimizer_type, options.learning_rate) == ("AdamW8bit", 1e-5)
    assert set(options.optimizer_args) == {"betas=0.9,0.999", "weight_decay=1e-4"}
    assert (options.lr_scheduler, options.max_train_steps) == ("constant", 850)
    assert (options.train_batch_size, options.max_grad_norm) == (1, 1.0)
    assert options.random_crop
    assert options.gradient_checkpointing
    assert not options.trains_text_encoders
    assert options.resolution is None  # the base's own: 1024 px
    assert (options.min_snr_gamma, options.noise_offset) == (None, None)
    assert options.pretrained_model_name_or_path == "stabilityai/stable-diffusion-xl-base-1.0"
    assert run.notices == ()


def test_the_objects_are_the_papers_in_its_order(tmp_path: Path) -> None:
    run = load_with_pictures("objects", tmp_path)
    found = [(t.concept, t.datasets[0].subsets[0].image_dir.name) for t in run.tasks]
    assert found == OBJECTS
    assert run.tasks[0].eval_prompts[0] == "a sks sneaker in a purple wizard outfit"
    captions = [t.datasets[0].subsets[0].class_tokens for t in run.tasks]
    assert captions[2] == "a photo of sbu backpack"


def test_an_order_seed_shuffles_as_the_paper_does(tmp_path: Path) -> None:
    run = load_with_pictures("objects", tmp_path, "--order_seed", "5")
    tasks = [Task(i, t.name, t.kind, t.concept, ()) for i, t in enumerate(run.tasks, 1)]
    expected = [t.name for t in run.tasks]
    random.seed(5)
    random.shuffle(expected)
    shuffled = shuffle_tasks(tasks, run.options.order_seed)
    assert [t.name for t in shuffled] == expected


def test_styles_are_captioned_by_style_and_object(tmp_path: Path) -> None:
    task = load_with_pictures("styles", tmp_path).tasks[0]
    assert task.kind == "style"
    assert task.datasets[0].subsets[0].class_tokens == f"{task.concept} image of Dogs"


def test_the_issues_smoke_command_loads(tmp_path: Path) -> None:
    flags = "--pretrained_model_name_or_path tiny-sdxl --max_train_steps 20 --strategy magmax"
    run = load_with_pictures("objects", tmp_path, *flags.split())
    assert {t.options.max_train_steps for t in run.tasks} == {20}
    assert run.options.strategy == "magmax"


def test_the_quickstart_needs_nothing_but_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # its images are found beside it from anywhere
    run = load_config(["--config", "quickstart"])
    assert len(run.tasks) == 4
    assert run.options.pretrained_model_name_or_path == "tiny-sdxl"
    assert run.options.cache_latents
    assert run.options.cache_text_encoder_outputs
    assert run.notices == ()


@pytest.mark.parametrize("name", ["five_styles", "mixed", "choosing_styles"])
def test_drawn_sequences_need_nothing_but_themselves(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = load_config(["--config", name])
    assert run.notices == ()
    for task in run.tasks:
        captions = {s.class_tokens for d in task.datasets for s in d.subsets}
        shown = {f"{task.concept} image of House", f"a photo of {task.concept}"}
        assert captions & shown, captions


def test_styles_are_learned_by_what_was_chosen_on_other_styles() -> None:
    five, mixed, chosen = (
        load_config(["--config", n]) for n in ("five_styles", "mixed", "choosing_styles")
    )
    assert not {t.name for t in chosen.tasks} & {t.name for t in (*five.tasks, *mixed.tasks)}
    assert len(five.tasks) == 5
    kinds = [task.kind for task in mixed.tasks]
    assert kinds == ["object", "style"] * 3  # by turns
    for run in (five, mixed):
        for task in run.tasks:
            reference = chosen if task.kind == "style" else load_config(["--config", "choosing"])
            wanted, ours = reference.tasks[0].options, task.options
            assert ours.max_train_steps == wanted.max_train_steps
            assert ours.learning_rate == wanted.learning_rate
            assert ours.network_args == wanted.network_args


@pytest.mark.parametrize("name", ["8gb", "12gb", "24gb", "paper"])
def test_presets_load_over_a_task_and_say_what_they_trade(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    flags = ["--pretrained_model_name_or_path", "x", "--train_data_dir", str(tmp_path)]
    run = load_config([*flags, "--preset", name])
    assert f"preset {name}" in run.provenance.values()
    head = (CONFIGS / f"preset_{name}.toml").read_text()
    assert head.startswith(f"# --preset {name}")
    assert "Trades" in head


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_the_head_of_a_config_is_its_command(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines()[:3] if line.startswith("#")]
    commands = [shlex.split(line.strip("# ").rstrip(":.")) for line in lines[:2]]
    if path.stem.startswith("preset_"):
        assert commands[0][:2] == ["--preset", commands[0][1]]
        return
    launch = next(c for c in commands if c[:2] == ["accelerate", "launch"])
    assert launch[2:4] == ["train_continual_sdxl.py", "--config"]
    assert Path(launch[4]).name == path.name


def test_configs_are_found_by_bare_name_with_or_without_ending() -> None:
    assert find_config("objects").resolve() == find_config("objects.toml").resolve()
    assert find_config("objects").resolve() == CONFIGS / "objects.toml"


def test_ours_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("objects", "configs/objects.toml", "configs/objects"):
        assert find_config(name).resolve() == CONFIGS / "objects.toml"
