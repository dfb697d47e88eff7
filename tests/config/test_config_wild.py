"""Configs as found in the wild: written by a GUI, by hand in sections, by data set file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lcp_plugin.config.load import RunConfig, load_config

# flat and sorted, with keys that the trainer does not know and numbers as text, as GUIs write it
GUI = """
bucket_no_upscale = true
bucket_reso_steps = 32
cache_latents = true
caption_extension = ".txt"
clip_skip = 1
dynamo_backend = "no"
enable_bucket = true
epoch = 1
gradient_accumulation_steps = 1
huber_c = 0.1
huber_schedule = "snr"
learning_rate = "0.0004"
loss_type = "l2"
lr_scheduler = "cosine"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
lr_warmup_steps = 0
max_bucket_reso = 2048
max_data_loader_n_workers = "0"
max_grad_norm = 1
max_timestep = 1000
max_token_length = 75
max_train_steps = "2"
min_bucket_reso = 64
mixed_precision = "no"
multires_noise_discount = 0.3
network_alpha = 4
network_args = []
network_dim = "8"
network_module = "networks.lora"
no_half_vae = true
noise_offset_type = "Original"
optimizer_args = []
optimizer_type = "AdamW"
output_dir = "out"
output_name = "gui"
pretrained_model_name_or_path = "{base}"
prior_loss_weight = 1
resolution = "64,64"
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_model_as = "safetensors"
save_precision = "fp16"
sdpa = true
text_encoder_lr = 5e-5
train_batch_size = 1
train_data_dir = "img"
unet_lr = 0.0001
vae = ""
wandb_run_name = "gui"
"""

# in sections, by hand
SECTIONS = """
[model_arguments]
pretrained_model_name_or_path = "{base}"
v2 = false

[dataset_arguments]
train_data_dir = "img"
reg_data_dir = "reg"
resolution = 64
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 2048
bucket_reso_steps = 32
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1

[network_arguments]
network_module = "networks.lora"
network_dim = 8
network_alpha = 4
network_train_unet_only = true

[optimizer_arguments]
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.01", "betas=0.9,0.99"]
unet_lr = 1e-4
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 2
lr_warmup_steps = 1

[training_arguments]
output_dir = "out"
output_name = "sections"
max_train_steps = 2
train_batch_size = 2
min_snr_gamma = 5
noise_offset = 0.0357
seed = 42
prior_loss_weight = 0.5
max_data_loader_n_workers = 0
"""

# by a data set file
BY_DATASET = """
pretrained_model_name_or_path = "{base}"
dataset_config = "data.toml"
network_module = "networks.lora"
network_dim = 8
network_alpha = 8
network_train_unet_only = true
cache_text_encoder_outputs = true
cache_latents = true
learning_rate = 1e-4
max_train_epochs = 1
output_dir = "out"
output_name = "dataset"
max_data_loader_n_workers = 0
"""
DATA = """
[general]
enable_bucket = true
shuffle_caption = false
caption_extension = ".txt"

[[datasets]]
resolution = [64, 64]
min_bucket_reso = 32
bucket_reso_steps = 32
batch_size = 2

  [[datasets.subsets]]
  image_dir = "img/2_sks disc"
  class_tokens = "sks disc"
  num_repeats = 2

  [[datasets.subsets]]
  image_dir = "reg/1_disc"
  is_reg = true
  class_tokens = "disc"

[[datasets]]
resolution = 32
batch_size = 1

  [[datasets.subsets]]
  image_dir = "img/2_sks disc"
  flip_aug = true
"""

Load = Callable[[str], RunConfig]


@pytest.fixture
def load(tmp_path: Path, toy_base: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load a config text over a toy base, with pictures, captions and regularisation images."""
    monkeypatch.chdir(tmp_path)
    for folder, count in (("img/2_sks disc", 3), ("reg/1_disc", 2)):
        path = tmp_path / folder
        path.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (64 + 32 * i, 64), (i * 80, 0, 90)).save(path / f"{i}.png")
            (path / f"{i}.txt").write_text(f"sks disc, number {i}, blue")
    (tmp_path / "data.toml").write_text(DATA)

    def build(text: str) -> RunConfig:
        (tmp_path / "wild.toml").write_text(text.replace("{base}", toy_base.as_posix()))
        return load_config(["--config_file", "wild"])

    return build


def test_a_gui_written_config_loads_with_notices_only(load: Load) -> None:
    run = load(GUI)
    options = run.options
    assert (options.rank, options.alpha, options.learning_rate) == (8, 4.0, 4e-4)
    assert (options.lora_targets, options.lora_init) == ("transformer", "kaiming")
    assert options.trains_text_encoders
    assert options.text_encoder_lr == (5e-5,)
    (task,) = run.tasks
    (subset,) = task.datasets[0].subsets
    assert (task.name, subset.num_repeats, subset.class_tokens) == ("gui", 2, "sks disc")
    unknown = [n for n in run.notices if "not known here" in n]
    assert len(unknown) == 1  # noise_offset_type
    assert "wild.toml: epoch = 1 is not used: max_train_steps is given." in run.notices


def test_a_sectioned_config_loads_without_a_word(load: Load) -> None:
    run = load(SECTIONS)
    assert run.notices == ()  # v2 = false says nothing
    (dataset,) = run.tasks[0].datasets
    assert [s.is_reg for s in dataset.subsets] == [False, True]
    assert (dataset.resolution, dataset.batch_size) == ((64, 64), 2)
    assert dataset.subsets[0].shuffle_caption
    assert run.options.prior_loss_weight == 0.5


def test_a_dataset_file_makes_two_data_sets(load: Load) -> None:
    run = load(BY_DATASET)
    first, second = run.tasks[0].datasets
    assert (first.resolution, first.batch_size, len(first.subsets)) == ((64, 64), 2, 2)
    assert (second.resolution, second.subsets[0].flip_aug) == ((32, 32), True)
    assert run.tasks[0].concept == "sks disc"


@pytest.mark.parametrize("text", [GUI, SECTIONS, BY_DATASET], ids=["gui", "sections", "dataset"])
def test_configs_from_the_wild_train(load: Load, text: str) -> None:
    from lcp_plugin.run.runner import execute

    run = execute(load(text))
    assert run.store.deliverable.is_file()
