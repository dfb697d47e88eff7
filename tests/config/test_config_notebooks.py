"""Configs as notebooks and forms save them: LyCORIS' networks, prompts as text, other models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from told import assert_one_error

from lcp_plugin.cli import main
from lcp_plugin.config.load import load_config
from lcp_plugin.config.prompts import read_prompts
from tests.config.test_config_foreign import EASY, FORM

# sections and keys as the notebooks for training in a browser write them
NOTEBOOK = """
[network_arguments]
unet_lr = 0.0003
text_encoder_lr = 0
network_dim = 8
network_alpha = 4
network_module = "networks.lora"
network_train_unet_only = true

[optimizer_arguments]
learning_rate = 0.0003
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 12
optimizer_type = "AdamW8bit"
optimizer_args = [ "weight_decay=0.1", "betas=[0.9,0.99]",]

[model_arguments]
pretrained_model_name_or_path = "tiny-sdxl"

[training_arguments]
max_train_epochs = 2
train_batch_size = 4
seed = 42
max_token_length = 225
lowram = false
persistent_data_loader_workers = true

[sample_prompt_arguments]
sample_every_n_epochs = 1
sample_sampler = "euler_a"

[saving_arguments]
save_precision = "fp16"
output_name = "my_toy"
output_dir = "out"
log_prefix = "my_toy"
"""
DATASET = """
[[datasets]]

[[datasets.subsets]]
num_repeats = 10
image_dir = "img/2_sks toy"
class_tokens = "my_toy"

[general]
resolution = 64
keep_tokens = 1
caption_extension = ""
enable_bucket = true
bucket_reso_steps = 64
min_bucket_reso = 256
max_bucket_reso = 4096
"""
MODULE = 'network_module = "networks.lora"'
LYCORIS = 'network_module = "lycoris.kohya"\nnetwork_args = [ "algo={}", {}]'

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(file, text, *flags): exit status and words of a dry run of this config."""
    monkeypatch.chdir(tmp_path)
    Path("img/2_sks toy").mkdir(parents=True)
    Image.new("RGB", (96, 64), "teal").save("img/2_sks toy/a.png")
    Path("dataset_config.toml").write_text(DATASET)
    Path("sample_prompt.txt").write_text("  a toy --n blurry --w 64 --h 64 --l 7 --s 2    \n")

    def dry_run(name: str, text: str, *flags: str) -> tuple[int, str]:
        Path(name).write_text(text, encoding="utf-8")
        status = main(["--config", name, "--dry_run", *flags])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return dry_run


BESIDE = ("--dataset_config", "dataset_config.toml", "--sample_prompts", "sample_prompt.txt")


def test_a_notebooks_two_files_and_its_prompts_are_read(run: Run) -> None:
    status, told = run("training_config.toml", NOTEBOOK, *BESIDE)
    assert status == 0, told
    options = load_config(["--config", "training_config.toml", *BESIDE]).options
    assert (options.network_dim, options.optimizer_type) == (8, "AdamW8bit")
    assert (options.max_train_epochs, options.network_train_unet_only) == (2, True)


@pytest.mark.parametrize(
    ("algorithm", "more", "wanted"),
    [
        ("locon", '"conv_dim=2", "conv_alpha=1"', ("conv_dim=2", "conv_alpha=1")),
        ("locon", '"preset=full"', ("conv_dim=8", "conv_alpha=4")),  # LyCORIS' defaults
        ("lora", '"conv_dim=2"', ("conv_dim=2", "conv_alpha=4")),
    ],
)
def test_lycoris_locon_is_kohyas(
    run: Run, algorithm: str, more: str, wanted: tuple[str, ...]
) -> None:
    text = NOTEBOOK.replace(MODULE, LYCORIS.format(algorithm, more))
    status, told = run("config_file.toml", text, *BESIDE)
    assert status == 0, told
    assert "LyCORIS' LoCon (preset full) is trained as networks.lora with conv_dim" in told
    options = load_config(["--config", "config_file.toml", *BESIDE]).options
    assert (options.network_module, options.network_args) == ("networks.lora", wanted)


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (LYCORIS.format("loha", '"conv_dim=2"'), "algo = 'loha' is not trained here"),
        (LYCORIS.format("ia3", ""), "algo = 'ia3' is not trained here"),
        (LYCORIS.format("locon", '"dora_wd=True"'), "dora_wd = true trains a DoRA"),
        (LYCORIS.format("locon", '"train_norm=True"'), "train_norm = true trains norm layers"),
        (LYCORIS.format("locon", '"preset=attn-only"'), "preset = 'attn-only' adapts other layers"),
        ('network_module = "networks.dylora"\nnetwork_args = ["unit=4"]', "'networks.dylora' is"),
        ('network_module = "networks.lora_fa"', "'networks.lora_fa' is not trained here"),
    ],
)
def test_a_network_that_is_none_of_ours_stops_in_one_line(
    run: Run, network: str, told: str
) -> None:
    text = NOTEBOOK.replace(MODULE, network)
    status, words = run("config_file.toml", text, *BESIDE)
    assert status != 0
    assert told in words
    assert_one_error(words)
    status, words = run("c.toml", text, *BESIDE, "--network_module", "networks.lora")
    assert status == 0, words


def test_the_tables_of_a_lycoris_locon_stay_together(run: Run) -> None:
    status, told = run("e.toml", EASY.replace('"locon"', '"locon"\npreset = ""'))
    assert status == 0, told
    args = load_config(["--config", "e.toml"]).options.network_args
    assert args == ("conv_dim=2", "conv_alpha=1")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('train_mode = "lora"', 'train_mode = "ti"', "a textual inversion"),
        ("network_dim = 4", "network_dim = 4\nfa = true", "LoRA-FA"),
        ('algo = "locon"', "unit = 4", "DyLoRA"),
        ('algo = "locon"', 'algo = "lokr"', "lokr"),
        ('optimizer_type = "AdamW"', 'optimizer_type = "Came"', "LoraEasyCustomOptimizer"),
        ('optimizer_type = "AdamW"', 'optimizer_type = "RMSProp"', "LoraEasyCustomOptimizer"),
        ("[train_mode]", "[flux_args.args]\nt5xxl = 'x'\n[train_mode]", "SDXL only"),
        ('optimizer_type = "AdamW"', 'lr_scheduler_type = "Nowhere.Rex"', "Nowhere"),
    ],
)
def test_what_easy_training_scripts_alone_can_train_stops(
    run: Run, old: str, new: str, told: str
) -> None:
    assert old in EASY
    status, words = run("e.toml", EASY.replace(old, new))
    assert status != 0
    assert told in words


def test_a_forms_prompts_are_its_text(run: Run) -> None:
    prompts = "a toy on a beach --w 64 --h 64 --s 3\na toy, drawn"
    status, told = run("gui.json", json.dumps({**FORM, "sample_prompts": prompts}))
    assert status == 0, told
    found = read_prompts(load_config(["--config", "gui.json"]).options.sample_prompts or "")
    assert [(p.prompt, p.sample_steps) for p in found] == [
        ("a toy on a beach", 3),
        ("a toy, drawn", 30),
    ]
    status, told = run("gui.json", json.dumps({**FORM, "sample_prompts": "a toy --s 0"}))
    assert status != 0
    assert "1 to 1000" in told


def test_a_form_for_sd15_is_pointed_out(run: Run) -> None:
    status, told = run("gui.json", json.dumps({**FORM, "sdxl": False, "bucket_reso_steps": 1}))
    assert status == 0, told
    assert "made for SD 1.5" in told
    assert "bucket_reso_steps is read as 8" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"LoRA_type": None, "network_dim": None, "network_alpha": None}, "the whole model"),
        ({"init_word": "toy", "LoRA_type": None, "network_dim": None, "network_alpha": None},
         "a textual inversion"),
        ({"LoRA_type": "LyCORIS/LoCon", "dora_wd": True}, "a DoRA"),
        ({"LoRA_type": "LyCORIS/LoCon", "LyCORIS_preset": "attn-only"}, "adapts other layers"),
        ({"LoRA_type": "LoRA-FA"}, "LoRA-FA"),
        ({"lumina_checkbox": True}, "SDXL only"),
    ],
)  # fmt: skip
def test_a_form_of_another_tab_or_network_stops(
    run: Run, changes: dict[str, object], told: str
) -> None:
    status, words = run("gui.json", json.dumps({**FORM, **changes}))
    assert status != 0
    assert told in words


def test_a_forms_lycoris_locon_leaves_out_what_its_front_end_does(run: Run) -> None:
    form = {**FORM, "LoRA_type": "LyCORIS/LoCon", "down_lr_weight": "1,1,1", "use_tucker": True}
    status, told = run("gui.json", json.dumps(form))
    assert status == 0, told
    assert "use_tucker of it is not used" in told
    args = load_config(["--config", "gui.json"]).options.network_args
    assert args == ("conv_dim=1", "rank_dropout=0.1", "conv_alpha=4")
