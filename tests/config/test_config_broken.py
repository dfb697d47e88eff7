"""Broken configs: every message names the key, the value and the remedy, before any model loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lcp_plugin.config.load import load_config
from lcp_plugin.errors import ConfigError

HEAD = 'pretrained_model_name_or_path = "tiny-sdxl"\n'
TASK = '[[tasks]]\nname = "dog"\nconcept = "sks dog"\nimage_dir = "dogs"\n'
DATA = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "dogs"\n'

# config text, flags, parts of the message
BROKEN: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "a typo at the top": (
        "learning_rat = 1e-4\n" + TASK, "", ("'learning_rat'", "Did you mean learning_rate?")),
    "a typo in a task": (
        TASK + "learnig_rate = 1e-4\n", "",
        ("tasks.dog", "'learnig_rate'", "Did you mean learning_rate?")),
    "a typo in a flag": (
        TASK, "--stratgy naive", ("command line", "--stratgy", "Did you mean --strategy?")),
    "an ambiguous flag": (TASK, "--network_d 4", ("--network_dim", "--network_dropout")),
    "a stray word": (TASK, "naive", ("'naive'", "options start with --")),
    "a flag without its value": (TASK, "--network_dim", ("--network_dim", "expected one argument")),
    "no task": ("", "", ("no task", "[[tasks]]", "train_data_dir", "dataset_config")),
    "an empty list of tasks": ("tasks = []\n", "", ("no task", "[[tasks]]")),
    "tasks that are no table": ("tasks = 3\n", "", ("no task", "[[tasks]]")),
    "two tasks of one name": (
        TASK + TASK.replace("dog\"\nc", "Dog\"\nc"), "", ("'Dog'", "name of its own")),
    "a name unfit for a folder": (
        TASK.replace('"dog"', '"a/b"'), "", ("tasks.a/b.name = 'a/b'", "letters, digits")),
    "a name that Windows reserves": (TASK.replace('"dog"', '"CON"'), "", ("'CON'", "unfit")),
    "a task without a name": (
        TASK.replace('name = "dog"\n', ""), "", ("tasks[0]", "name is missing")),
    "a task without images": (
        TASK.replace('image_dir = "dogs"\n', ""), "", ("tasks.dog", "no images", "image_dir")),
    "a missing image folder": (
        TASK.replace('"dogs"', '"dgos"'), "",
        ("tasks.dog.image_dir 'dgos'", "does not exist", "data_root")),
    "an empty image folder": (
        TASK.replace('"dogs"', '"empty"'), "",
        ("image_dir 'empty'", "no images", "put some there")),
    "a file as image folder": (
        TASK.replace('"dogs"', '"dogs/0.png"'), "", ("'dogs/0.png'", "is a file, not a folder")),
    "an object's folder of folders": (
        TASK.replace('"dogs"', '"parent"'), "", ("'parent'", "holds no images", "inner")),
    "a number as image folder": (
        TASK.replace('"dogs"', "3"), "", ("image_dir = 3", "a folder in quotes")),
    "a wrong kind": (
        TASK + 'kind = "stile"\n', "",
        ("kind = 'stile'", "object or style", "Did you mean style?")),
    "an option of the run in a task": (
        TASK + 'strategy = "naive"\n', "", ("tasks.dog.strategy", "above the first [[tasks]]")),
    "two sources of images": (
        TASK + 'dataset_config = "x.toml"\n', "", ("image_dir and dataset_config", "keep one")),
    "prompts that are no list": (TASK + "eval_prompts = 3\n", "", ("eval_prompts = 3", "a list")),
    "rank zero": ("network_dim = 0\n" + TASK, "", ("network_dim = 0", "at least 1")),
    "a negative rate": ("learning_rate = -1\n" + TASK, "", ("learning_rate = -1", "at least 0")),
    "a word for a number": (
        'max_train_steps = "many"\n' + TASK, "", ("max_train_steps = 'many'", "wanted a number")),
    "half a step": ("max_train_steps = 2.5\n" + TASK, "", ("max_train_steps", "whole number")),
    "an infinite rate": ("learning_rate = inf\n" + TASK, "", ("learning_rate", "finite")),
    "a truth value for a number": (
        "network_dim = true\n" + TASK, "", ("network_dim = True", "number")),
    "a word for a truth value": ('flip_aug = "maybe"\n' + TASK, "", ("flip_aug", "true or false")),
    "a choice that is none": (
        'loss_type = "bogus"\n' + TASK, "", ("loss_type = 'bogus'", "l2, l1, huber, smooth_l1")),
    "a resolution of three": (
        'resolution = "1,2,3"\n' + TASK, "", ("resolution = '1,2,3'", "width,height")),
    "an unknown optimizer": (
        'optimizer_type = "AdamW9bit"\n' + TASK, "", ("'AdamW9bit'", "Did you mean AdamW8bit?")),
    "an argument without a value": (
        'optimizer_args = ["weight_decay"]\n' + TASK, "", ("optimizer_args", "key=value")),
    "an unknown network argument": (
        'network_args = ["conv_dims=4"]\n' + TASK, "", ("'conv_dims'", "Did you mean conv_dim?")),
    "another network module": (
        'network_module = "networks.lora_fa"\n' + TASK, "", ("'networks.lora_fa'", "only LoRA")),
    "full_bf16 without bf16": (
        "full_bf16 = true\n" + TASK, "", ("full_bf16", "mixed_precision = bf16")),
    "timesteps upside down": (
        "min_timestep = 900\nmax_timestep = 100\n" + TASK, "", ("min_timestep = 900", "exchange")),
    "adaptive noise without offset": (
        "adaptive_noise_scale = 0.1\n" + TASK, "", ("adaptive_noise_scale", "needs noise_offset")),
    "ranks of no file": (
        "dim_from_weights = true\n" + TASK, "", ("dim_from_weights", "needs network_weights")),
    "nothing to train": (
        "network_train_unet_only = true\nnetwork_train_text_encoder_only = true\n" + TASK, "",
        ("network_train_unet_only", "leave nothing")),
    "everything dropped": (
        "network_dropout = 1\n" + TASK, "", ("network_dropout = 1", "a share below 1")),
    "samples without prompts": (
        "sample_every_n_epochs = 1\n" + TASK, "", ("sample_prompts", "is missing")),
    "a path as output name": (
        'output_name = "a/b"\n' + TASK, "", ("output_name = 'a/b'", "output_dir")),
    "a missing dataset file": (
        'dataset_config = "nope.toml"\n', "", ("dataset_config 'nope.toml'", "is not a file")),
    "a missing train_data_dir": (
        'train_data_dir = "nope"\n', "", ("train_data_dir 'nope'", "does not exist")),
    "a train_data_dir without images": (
        'train_data_dir = "empty"\n', "", ("train_data_dir 'empty'", "<repeats>_<class>")),
    "an unknown key of a subset": (
        "tasks = [{name = 'x', datasets = [{subsets = [{image_dir = 'dogs', num_repeat = 2}]}]}]\n",
        "", ("'num_repeat'", "Did you mean num_repeats?")),
    "a subset without image_dir": (
        "tasks = [{name = 'x', datasets = [{subsets = [{num_repeats = 2}]}]}]\n", "",
        ("datasets[0].subsets[0]", "image_dir is missing")),
    "a size that is none": (
        'max_file_size = "big"\n' + TASK, "", ("max_file_size = 'big'", "2GB")),
    "an unknown form of export": ('export = ["zip"]\n' + TASK, "", ("'zip'", "diffusers, peft")),
    "a sampler that zero terminal SNR forbids": (
        'zero_terminal_snr = true\nsample_sampler = "heun"\n' + TASK, "",
        ("'heun'", "pure noise", "euler")),
    "a resolution between the grid": (
        'resolution = "1020"\n' + TASK, "", ("resolution = '1020'", "multiple of 8", "1024")),
    "a state that kohya pickled": (
        'resume = "state"\n' + TASK, "", ("resume = 'state'", "pickled", "network_weights")),
    "a state that is none": ('resume = "dogs"\n' + TASK, "", ("resume = 'dogs'", "state.json")),
    "a missing state": ('resume = "nope"\n' + TASK, "", ("resume = 'nope'", "not a folder")),
    "weights that are not there": (
        'network_weights = "no.safetensors"\n' + TASK, "",
        ("network_weights = 'no.safetensors'", "does not exist")),
    "prompts that are not there": (
        'sample_prompts = "no.txt"\n' + TASK, "", ("sample_prompts = 'no.txt'", "cannot be read")),
    "data sets outside the tasks": (
        TASK + "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'dogs'\n", "",
        ("[[tasks.datasets]]", "datasets stand in a task")),
    "general without data sets": (
        TASK + "[tasks.general]\nflip_aug = true\n", "",
        ("tasks.dog.general", "[[tasks.datasets]]")),
    "one task as a plain table": (
        "[tasks]\nname = 'dog'\nimage_dir = 'dogs'\n", "", ("no task", "[[tasks]]")),
    "a misspelt list of tasks": (
        TASK.replace("tasks", "task"), "", ("unknown key 'task'", "Did you mean tasks?")),
    "a table within a table": (
        "[network_arguments.inner]\nnetwork_dim = 8\n" + TASK, "",
        ("inner is a table", "move its keys up")),
    "an unknown preset": (
        'preset = "16gb"\n' + TASK, "", ("preset = '16gb'", "8gb, 12gb, 24gb, paper")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dogs", "empty", "parent/inner", "state"):
        Path(name).mkdir(parents=True)
    Path("state/random_states_0.pkl").write_bytes(b"")
    for folder in ("dogs", "parent/inner"):
        Image.new("RGB", (8, 8)).save(Path(folder) / "0.png")


def problems_of(text: str, *flags: str) -> tuple[str, ...]:
    Path("run.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", "run.toml", *flags])
    assert caught.value.exit_code == 2
    return caught.value.problems


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_config_gets_one_clear_line(case: str) -> None:
    text, flags, parts = BROKEN[case]
    problems = problems_of(HEAD + text, *flags.split())
    fitting = [p for p in problems if all(part in p for part in parts)]
    assert len(fitting) == 1, problems
    assert "\n" not in fitting[0]


def test_all_problems_are_listed_at_once_each_with_its_source() -> None:
    text = "network_dim = 0\nloss_type = 'x'\nlearning_rat = 1\n" + TASK.replace("dogs", "nope")
    problems = problems_of(text, "--seed=-1")
    assert len(problems) == 6  # and no base
    assert sum(p.startswith("run.toml: ") for p in problems) == 4
    assert sum(p.startswith("command line: ") for p in problems) == 1


def test_no_base_is_refused() -> None:
    assert "pretrained_model_name_or_path" in problems_of(TASK)[0]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('vae = "C:\\\\Users\\\\new"'.replace("\\\\", "\\"), ("run.toml", "single quotes")),
        ("a = \n", ("run.toml", "is not valid")),
        ("[[tasks]\n", ("run.toml", "is not valid")),
    ],
)
def test_broken_toml_names_file_and_remedy(text: str, parts: tuple[str, ...]) -> None:
    problem = problems_of(text)[0]
    assert all(part in problem for part in parts)
    assert "\n" not in problem


def test_a_file_in_another_encoding_is_refused() -> None:
    Path("run.toml").write_bytes("a = 'ü'".encode("utf-16"))
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        load_config(["--config", "run.toml"])


def test_a_missing_config_lists_ours_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match="objects.*Did you mean objects"):
        load_config(["--config", "objcts"])


def test_two_config_files_are_refused() -> None:
    with pytest.raises(ConfigError, match="give one"):
        load_config(["--config", "a", "--config_file", "b"])


def test_the_command_line_prints_the_problems_without_a_traceback_or_a_model() -> None:
    Path("run.toml").write_text(HEAD + "network_dim = 0\n" + TASK)
    code = (
        "import sys; from lcp_plugin.cli import main; "
        "status = main(['--config', 'run.toml']); "
        "print('loaded', 'diffusers' in sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "network_dim = 0: wanted at least 1." in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "loaded False" in done.stdout
