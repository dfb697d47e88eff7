"""No option is accepted and ignored: each is set, and what it should change is seen to change.

Every case is (flags of both runs, flags of the second run only). What is looked at: the batches
of a task, the loss of a training step, and a task's course (rates, steps, files, samples).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from toy_values import scaled_linear_betas

from lcp_plugin.config.load import load_config
from lcp_plugin.config.milestones import list_save_points, samples_at, validates_at
from lcp_plugin.config.options import Options, option_fields
from lcp_plugin.config.rates import PartRates, module_rates
from lcp_plugin.data.dataset import TaskData
from lcp_plugin.sdxl.loss import LossSettings, compute_loss
from lcp_plugin.sdxl.noise import (
    NoiseSchedule,
    NoiseSettings,
    add_noise,
    alphas_cumprod,
    draw_timesteps,
    make_noise,
    make_target,
    perturb_noise,
    zero_terminal_betas,
)
from lcp_plugin.training.schedules import RateSchedule, make_multiplier

CACHES = "--cache_latents --cache_text_encoder_outputs"
SHUFFLE = "--shuffle_caption"
BUCKETS = "--enable_bucket --bucket_reso_steps 8 --min_bucket_reso 16 --max_bucket_reso 64"
DATA: dict[str, tuple[str, str]] = {
    "train_data_dir": ("", "--train_data_dir other"),
    "reg_data_dir": ("", "--reg_data_dir reg"),
    "prior_loss_weight": ("--reg_data_dir reg", "--prior_loss_weight 0.5"),
    "dataset_config": ("", "--dataset_config data.toml"),
    "resolution": ("", "--resolution 16"),
    "train_batch_size": ("", "--train_batch_size 2"),
    "in_json": ("", "--in_json meta.json --train_data_dir train/2_dog"),
    "dataset_repeats": (
        "--in_json meta.json --train_data_dir train/2_dog", "--dataset_repeats 2"),
    "data_root": ("", "--data_root root"),
    "masked_loss": ("--conditioning_data_dir masks", "--masked_loss"),
    "conditioning_data_dir": ("--masked_loss", "--conditioning_data_dir masks"),
    "seed": ("", "--seed 9"),
    "validation_split": ("", "--validation_split 0.4"),
    "validation_seed": ("--validation_split 0.4", "--validation_seed 1"),
    "caption_extension": ("", "--caption_extension .cap"),
    "caption_extention": ("", "--caption_extention .cap"),
    "caption_separator": (SHUFFLE, "--caption_separator ;"),
    "shuffle_caption": ("", SHUFFLE),
    "keep_tokens": (SHUFFLE, "--keep_tokens 2"),
    "keep_tokens_separator": (SHUFFLE, "--keep_tokens_separator |||"),
    "secondary_separator": ("", "--secondary_separator ;"),
    "caption_prefix": ("", "--caption_prefix sks"),
    "caption_suffix": ("", "--caption_suffix photo"),
    "enable_wildcard": ("", "--enable_wildcard"),
    "caption_dropout_rate": ("", "--caption_dropout_rate 0.5"),
    "caption_dropout_every_n_epochs": ("", "--caption_dropout_every_n_epochs 1"),
    "caption_tag_dropout_rate": ("", "--caption_tag_dropout_rate 0.5"),
    "token_warmup_step": ("", "--token_warmup_step 100"),
    "token_warmup_min": ("--token_warmup_step 100", "--token_warmup_min 3"),
    "enable_bucket": ("--bucket_reso_steps 8 --min_bucket_reso 16", "--enable_bucket"),
    "min_bucket_reso": (BUCKETS, "--min_bucket_reso 24"),
    "max_bucket_reso": (BUCKETS, "--max_bucket_reso 40"),
    "bucket_reso_steps": (BUCKETS, "--bucket_reso_steps 16"),
    "bucket_no_upscale": (f"{BUCKETS} --resolution 256", "--bucket_no_upscale"),
    "resize_interpolation": ("", "--resize_interpolation nearest"),
    "flip_aug": ("", "--flip_aug"),
    "color_aug": ("", "--color_aug"),
    "random_crop": ("", "--random_crop"),
    "alpha_mask": ("", "--alpha_mask"),
    "cache_latents": ("", "--cache_latents"),
    "cache_latents_to_disk": (CACHES, "--cache_latents_to_disk"),
    "vae_batch_size": (CACHES, "--vae_batch_size 2"),
    "cache_text_encoder_outputs": ("", "--cache_text_encoder_outputs"),
    "cache_text_encoder_outputs_to_disk": (CACHES, "--cache_text_encoder_outputs_to_disk"),
}  # fmt: skip
V = "--v_parameterization"
LOSS: dict[str, tuple[str, str]] = {
    "noise_offset": ("", "--noise_offset 0.1"),
    "noise_offset_random_strength": ("--noise_offset 0.1", "--noise_offset_random_strength"),
    "adaptive_noise_scale": ("--noise_offset 0.1", "--adaptive_noise_scale 0.1"),
    "multires_noise_iterations": ("", "--multires_noise_iterations 4"),
    "multires_noise_discount": (
        "--multires_noise_iterations 4", "--multires_noise_discount 0.8"),
    "ip_noise_gamma": ("", "--ip_noise_gamma 0.1"),
    "ip_noise_gamma_random_strength": (
        "--ip_noise_gamma 0.1", "--ip_noise_gamma_random_strength"),
    "min_snr_gamma": ("--max_timestep 200", "--min_snr_gamma 5"),
    "debiased_estimation_loss": ("", "--debiased_estimation_loss"),
    "scale_v_pred_loss_like_noise_pred": (V, "--scale_v_pred_loss_like_noise_pred"),
    "v_pred_like_loss": ("", "--v_pred_like_loss 0.5"),
    "v_parameterization": ("", V),
    "zero_terminal_snr": (V, "--zero_terminal_snr"),
    "min_timestep": ("", "--min_timestep 900"),
    "max_timestep": ("", "--max_timestep 100"),
    "loss_type": ("", "--loss_type l1"),
    "huber_schedule": ("--loss_type huber", "--huber_schedule constant"),
    "huber_c": ("--loss_type huber", "--huber_c 0.5"),
    "huber_scale": ("--loss_type huber", "--huber_scale 0.5"),
}  # fmt: skip
COSINE = "--lr_scheduler cosine_with_min_lr --lr_scheduler_min_lr_ratio 0.1"
STABLE = "--lr_scheduler warmup_stable_decay --lr_warmup_steps 3 --lr_decay_steps 4"
EPOCHS = "--save_every_n_epochs 1 --save_state"
STEPS = "--save_every_n_steps 2 --save_state"
PROMPTS = "--sample_prompts prompts.txt"
SPLIT = "--validation_split 0.4"
COURSE: dict[str, tuple[str, str]] = {
    "max_train_steps": ("", "--max_train_steps 9"),
    "max_train_epochs": ("", "--max_train_epochs 2"),
    "gradient_accumulation_steps": (
        "--max_train_epochs 2", "--gradient_accumulation_steps 2"),
    "learning_rate": ("", "--learning_rate 1e-3"),
    "unet_lr": ("", "--unet_lr 1e-3"),
    "text_encoder_lr": ("", "--text_encoder_lr 1e-3"),
    "text_encoder_lr1": ("", "--text_encoder_lr1 1e-3"),
    "text_encoder_lr2": ("", "--text_encoder_lr2 1e-3"),
    "network_args": ("", "--network_args mid_lr_weight=1,.5,1"),
    "network_train_unet_only": ("--network_module networks.lora", "--network_train_unet_only"),
    "network_train_text_encoder_only": (
        "--network_module networks.lora", "--network_train_text_encoder_only"),
    "lr_scheduler": ("", "--lr_scheduler cosine"),
    "lr_warmup_steps": ("", "--lr_warmup_steps 5"),
    "lr_decay_steps": (STABLE, "--lr_decay_steps 8"),
    "lr_scheduler_num_cycles": (
        "--lr_scheduler cosine_with_restarts", "--lr_scheduler_num_cycles 3"),
    "lr_scheduler_power": ("--lr_scheduler polynomial", "--lr_scheduler_power 2"),
    "lr_scheduler_timescale": (
        "--lr_scheduler inverse_sqrt --lr_warmup_steps 2", "--lr_scheduler_timescale 7"),
    "lr_scheduler_min_lr_ratio": (COSINE, "--lr_scheduler_min_lr_ratio 0.5"),
    "lr_scheduler_args": (
        "--lr_scheduler piecewise_constant --lr_scheduler_args step_rules=1:10,0.1",
        "--lr_scheduler_args step_rules=1:5,0.1"),
    "save_every_n_epochs": ("", "--save_every_n_epochs 1"),
    "save_every_n_steps": ("", "--save_every_n_steps 3"),
    "save_n_epoch_ratio": ("", "--save_n_epoch_ratio 2"),
    "save_last_n_epochs": (EPOCHS, "--save_last_n_epochs 1"),
    "save_last_n_epochs_state": (EPOCHS, "--save_last_n_epochs_state 1"),
    "save_last_n_steps": (STEPS, "--save_last_n_steps 4"),
    "save_last_n_steps_state": (STEPS, "--save_last_n_steps_state 4"),
    "save_state": ("--save_every_n_steps 2", "--save_state"),
    "sample_prompts": ("--sample_at_first", PROMPTS),
    "sample_at_first": (PROMPTS, "--sample_at_first"),
    "sample_every_n_steps": (PROMPTS, "--sample_every_n_steps 2"),
    "sample_every_n_epochs": (PROMPTS, "--sample_every_n_epochs 1"),
    "validate_every_n_steps": (SPLIT, "--validate_every_n_steps 2"),
    "validate_every_n_epochs": (SPLIT, "--validate_every_n_epochs 2"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything that the flags of the tables name."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("train/2_dog", 4), ("other", 3), ("reg/1_dog", 2), ("root/train/1_x", 2)):
        path = tmp_path / name
        path.mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 48 + 40 * i, 4), np.uint8)
            Image.fromarray(pixels).save(path / f"{i}.png")
            text = f"dog;{i}, {{red|blue}}, big ||| old, on grass, at night"
            (path / f"{i}.txt").write_text(text)
            (path / f"{i}.cap").write_text(f"another {i}")
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(4):
        Image.new("L", (48, 40), 40 * i).save(masks / f"{i}.png")
    (tmp_path / "meta.json").write_text('{"0": {"caption": "x"}, "1": {"caption": "y"}}')
    (tmp_path / "data.toml").write_text(
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'other'\nnum_repeats = 3\n"
    )
    (tmp_path / "prompts.txt").write_text("a dog\n")
    return tmp_path


def load(flags: str) -> Any:
    common = "--pretrained_model_name_or_path x --train_data_dir train --max_train_steps 20"
    # the last of two equal flags holds, except that lists would be joined
    return load_config([*common.split(), *flags.split()])


def digest(value: Any) -> str:
    """Tells any two batches, lists of numbers or texts apart."""
    if isinstance(value, Tensor):
        value = (tuple(value.shape), value.detach().double().numpy().tobytes())
    elif isinstance(value, Mapping):
        value = sorted((k, digest(v)) for k, v in value.items())
    return hashlib.sha256(repr(value).encode()).hexdigest()


def see_data(flags: str, folder: Path) -> str:
    """A task's batches, how they were encoded, and what is cached."""
    run = load(f"--network_train_unet_only {flags}")
    cache = folder / "cache" / digest(flags)[:8]
    data = TaskData(run.tasks[0], run.options.seed, 1, (32, 32), cache)
    calls = []

    def images(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        return functional.avg_pool2d(pixels, 8)

    def prompts(texts: Sequence[str]) -> Mapping[str, Tensor]:
        lengths = torch.tensor([float(sum(map(ord, t))) for t in texts])
        return {
            "encoder_hidden_states": lengths.view(-1, 1, 1),
            "text_embeds": lengths.view(-1, 1),
        }

    data.prepare(images, prompts, "vae", "text")
    files = [p for p in cache.rglob("*") if p.is_file()] if cache.is_dir() else []
    batches = [digest(data.batch(k)) for k in range(6)]
    return digest([batches, calls, len(files), data.num_batches_per_epoch])


def see_loss(flags: str, folder: Path) -> str:
    """Timesteps, target, noisy latents and loss of a step with fixed numbers."""
    options: Options = load(flags).options
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((4, 4, 8, 8), generator=generator) + 1
    betas = scaled_linear_betas()
    betas = zero_terminal_betas(betas) if options.zero_terminal_snr else betas
    alphas = alphas_cumprod(betas)
    kind = "v_prediction" if options.v_parameterization else "epsilon"
    settings, schedule = NoiseSettings.of(options), NoiseSchedule(alphas, kind)
    timesteps = draw_timesteps(4, settings, 1000, generator)
    noise = make_noise(latents, settings, generator)
    noisy = add_noise(latents, perturb_noise(noise, settings, generator), timesteps, alphas)
    target = make_target(latents, noise, timesteps, alphas, kind)
    loss = compute_loss(0.5 * noisy, target, timesteps, schedule, LossSettings.of(options))
    return digest(float(loss))


def see_course(flags: str, folder: Path) -> str:
    """Steps, rates at every step, files, samples and validations of a task."""
    run = load(flags)
    options: Options = run.tasks[0].options
    data = TaskData(run.tasks[0], 0, 1, (32, 32))
    total, epoch = data.total_steps(), data.steps_per_epoch()
    parts, args = PartRates.of(options), options.network
    modules = ["unet.x", "text_encoder.x", "text_encoder_2.x"]
    rates = [module_rates(m, "middle_block.1.proj_in", parts, args) for m in modules]
    multiplier = make_multiplier(RateSchedule.of(options), total)
    return digest(
        [
            total,
            rates,
            [multiplier(step) for step in range(total)],
            list_save_points(options, total, epoch),
            [step for step in range(total) if samples_at(options, step, epoch)],
            [step for step in range(total) if validates_at(options, step, epoch)],
        ]
    )


CASES = [
    *((see_data, name, *case) for name, case in DATA.items()),
    *((see_loss, name, *case) for name, case in LOSS.items()),
    *((see_course, name, *case) for name, case in COURSE.items()),
]


@pytest.mark.parametrize(
    ("see", "name", "both", "second"), CASES, ids=[f"{c[0].__name__}-{c[1]}" for c in CASES]
)
def test_an_option_changes_what_it_should(
    folder: Path, see: Callable[[str, Path], str], name: str, both: str, second: str
) -> None:
    assert f"--{name}" in second
    assert see(both, folder) == see(both, folder), "what is looked at must be repeatable"
    assert see(both, folder) != see(f"{both} {second}", folder)


@pytest.mark.parametrize("name", [n for n, f in option_fields().items() if f.metadata["no_effect"]])
def test_an_option_without_effect_is_told_with_its_reason(folder: Path, name: str) -> None:
    field = option_fields()[name]
    value = "true" if field.default is False else "2" if "int" in str(field.type) else "3"
    if field.metadata["choices"]:
        value = str(field.metadata["choices"][0])
    notices = load(f"--{name} {value}").notices
    assert any(name in n and field.metadata["no_effect"] in n for n in notices) or (
        str(field.default) == value
    )
